"""``pool doctor``: what is wrong with the deployment, and what to do."""

from dataclasses import asdict
from typing import Any

import click
from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from pool.cli.command import OK, UNUSABLE, WRONG, command
from pool.cli.screen import Screen
from pool.cli.words import plain
from pool.doctor import TIMEOUT, Finding, diagnose, worst

STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "bold red"}
CODES = {"ok": OK, "info": OK, "warning": WRONG, "error": UNUSABLE}


@command
@click.option("--fix", is_flag=True, help="Also do what is safe to do.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="For each check; they run side by side.",
)
def doctor(app: Any, screen: Screen, fix: bool, timeout: float) -> int:
    """Find what is wrong, and how to mend it.

    Looks at broker, Redis, hosts, settings, nodes and left-overs.

    Exits with 0, 1 if the worst finding is a warning, 2 if it is an error.
    """
    findings = diagnose(app, fix=fix, timeout=timeout)
    level = worst(findings)
    screen.tell({"worst": level, "findings": [asdict(finding) for finding in findings]})
    screen.show(*(_shown(finding) for finding in findings))
    return CODES[level]


def _shown(finding: Finding) -> Any:
    level = "fixed" if finding.fixed else finding.level
    style = "green" if finding.fixed else STYLES[finding.level]
    parts: list[Any] = [Text.assemble((f"{level:<8}", style), plain(finding.what))]
    if finding.why:
        parts.append(Padding(Text(plain(finding.why), "dim"), (0, 0, 0, 8)))
    if finding.fix:
        parts.append(Padding(Text.assemble(("fix: ", "bold"), plain(finding.fix)), (0, 0, 0, 8)))
    return Group(*parts)
