"""``pool status``: nodes, shards and backends on one screen."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from pool.cli.command import OK, WRONG, command, timeout_option
from pool.cli.nodes import Nodes
from pool.cli.overview import Overview, letters
from pool.cli.screen import Cell, Screen, grid
from pool.cli.words import count, duration, many, percent, plain

COLUMNS = (
    "", "node", "state", "shards", "backends", "busy", "idle", "waiting", "running", "warm", "oldest", "lease"
)  # fmt: skip
NUMBERS = COLUMNS[3:]
MAPPED = 512
"""Shards whose owners are shown one by one, at most."""
ROW = 64
"""Shards in a line of the map, at most."""


@command
@timeout_option
def status(app: Any, screen: Screen, timeout: float) -> int:
    """Show nodes, shards and backends on one screen.

    Exits with 1 if a node does not answer, or a shard has no owner.
    """
    found = Overview.of(Nodes(app, timeout))
    screen.tell(found.told())
    screen.show(*parts(found, screen))
    return WRONG if found.problems else OK


def parts(found: Overview, screen: Screen) -> Iterator[Any]:
    """What of it is shown, from top to bottom."""
    names = letters(found.nodes)
    if found.nodes:
        rows = [_row(node, names[node["node"]]) for node in found.nodes]
        yield grid(screen.out.width, COLUMNS, rows, right=NUMBERS)
        yield ""
    yield from _shards(found, names, screen.out.width)
    yield totals(found)
    for problem in found.problems:
        yield Text(f"! {plain(problem)}", "bold red")


def _row(node: dict[str, Any], letter: str) -> list[Cell]:
    state = node["state"]
    style = {"no answer": "bold red", "draining": "yellow"}.get(state, "green")
    return [
        letter,
        node["node"],
        (state, style),
        count(node.get("shards")),
        count(node.get("total")),
        count(node.get("busy")),
        count(node.get("idle")),
        count(node.get("waiting")),
        count(node.get("running")),
        percent(node.get("hit_rate")),
        duration(node.get("oldest_busy_s")) if node.get("busy") else "",
        duration(node.get("lease_age_s")),
    ]


def _shards(found: Overview, names: dict[str, str], width: int) -> Iterator[Any]:
    shards = found.shards
    moving = len(shards["moving"])
    told = [many(shards["total"], "shard"), f"{count(shards['owned'])} owned"]
    if shards["free"]:
        told.append(f"{count(shards['free'])} without an owner")
    if moving:
        told.append(f"{count(moving)} in handoff")
    yield ", ".join(told) + "."
    owners = shards["owners"]
    if not owners or shards["total"] > MAPPED:
        return
    of = {shard: names.get(node, "?") for node, held in owners.items() for shard in held}
    of |= dict.fromkeys(shards["moving"], ">")
    per_line = max(8, min(ROW, (width - 8) // 8 * 8))
    for first in range(0, shards["total"], per_line):
        last = min(first + per_line, shards["total"])
        yield f"{first:>5}  " + "".join(of.get(shard, ".") for shard in range(first, last))
    if moving or shards["free"]:
        yield "       > in handoff, . nobody's"


def totals(found: Overview) -> str:
    """Everything of all nodes that answer, in one sentence."""
    sums = found.totals
    warm = percent(sums["hit_rate"])
    return (
        f"{many(found.answering, 'node')} answering: {many(sums['total'], 'backend')}, {count(sums['busy'])} busy,"
        f" {count(sums['idle'])} idle; {many(sums['running'], 'task')} running, {count(sums['waiting'])} waiting"
        f"{f', {warm} warm' if warm else ''}."
    )
