"""``pool drain NODE`` and ``pool undrain NODE``: take a node's shards off it, and let it take part again."""

from time import monotonic, sleep
from typing import Any

import click

from pool.cli.command import OK, WRONG, command, timeout_option
from pool.cli.nodes import Nodes, Problem
from pool.cli.screen import Screen
from pool.cli.sweep import told
from pool.cli.words import many

LOOK = 0.2
"""Seconds between two looks at the lease table."""


@command
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
@click.option("--wait", is_flag=True, help="Return when the nodes have no shards any more.")
@click.option(
    "--wait-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="How long to wait.  [default: POOL_HANDOFF_TIMEOUT and a minute]",
)
@timeout_option
def drain(
    app: Any, screen: Screen, nodes: tuple[str, ...], wait: bool, wait_timeout: float | None, timeout: float
) -> int:
    """Hand a node's shards over to the others.

    It takes none until `undrain`. What runs there may finish. Exits with 1 if the node does not answer, or still
    has shards after --wait-timeout.
    """
    found = Nodes(app, timeout)
    names = found.named(nodes)
    if not wait:
        return told(screen, found.ask("pool_drain", to=names))
    replies = found.ask("pool_drain", to=names)
    refused = [f"{node}: {reply['error']}" for node, reply in replies.answers.items() if "error" in reply]
    if refused or replies.missing:
        raise Problem("; ".join([*refused, *(f"{node} does not answer" for node in replies.missing)]), WRONG)
    left = _wait(found, screen, names, wait_timeout or found.settings.handoff_timeout + 60.0)
    screen.tell({"answers": replies.answers, "no_answer": [], "shards": left})
    for node, count in left.items():
        screen.show(f"{node}: still has {many(count, 'shard')}" if count else f"{node}: has no shards any more")
    return WRONG if any(left.values()) else OK


@command
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
@timeout_option
def undrain(app: Any, screen: Screen, nodes: tuple[str, ...], timeout: float) -> int:
    """Let a node take shards again.

    Exits with 1 if it does not answer.
    """
    found = Nodes(app, timeout)
    return told(screen, found.ask("pool_undrain", to=found.named(nodes)))


def _wait(found: Nodes, screen: Screen, names: list[str], seconds: float) -> dict[str, int]:
    """Wait until the nodes own nothing; return what each still owns."""
    deadline = monotonic() + seconds
    before: dict[str, int] = {}
    while True:
        left = dict.fromkeys(names, 0)
        table = found.read()
        for shard in table.leases if table is not None else ():
            seen = table.owner(shard) if table is not None else None
            if seen is not None and seen.node in left:
                left[seen.node] += 1
        if table is not None and (not any(left.values()) or monotonic() > deadline):
            return left
        if left != before:
            screen.note("waiting: " + ", ".join(f"{node} has {many(left[node], 'shard')}" for node in names), "dim")
            before = left
        if monotonic() > deadline:
            raise Problem(found.trouble or "the lease table cannot be read", WRONG)
        sleep(LOOK)
