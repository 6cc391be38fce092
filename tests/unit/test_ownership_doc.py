"""docs/ownership.md shows the machine that runs."""

import re
from pathlib import Path

from pool.sharding.handoff import TRANSITIONS

DOC = Path(__file__).resolve().parents[2] / "docs" / "ownership.md"


def diagram() -> str:
    """The transition table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> restoring"]
    for state, steps in TRANSITIONS.items():
        by_target: dict[str, list[str]] = {}
        for event, target in steps.items():
            by_target.setdefault(target, []).append(event)
        lines += [f"    {state} --> {target}: {', '.join(events)}" for target, events in by_target.items()]
    return "\n".join([*lines, "    gone --> [*]"])


def test_the_diagram_is_drawn_from_the_table() -> None:
    """To draw it anew: python -c 'from tests.unit.test_ownership_doc import diagram; print(diagram())'."""
    found = re.search(r"```mermaid\n(.*?)\n```", DOC.read_text(), re.DOTALL)
    assert found
    assert found[1] == diagram()
