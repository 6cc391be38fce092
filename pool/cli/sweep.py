"""``pool sweep``: evict idle backends now."""

from typing import Any

import click

from pool.cli.command import OK, WRONG, command, timeout_option
from pool.cli.nodes import Nodes, Replies
from pool.cli.screen import Screen
from pool.cli.words import plain


@command
@click.argument("nodes", metavar="[NODE]...", nargs=-1)
@timeout_option
def sweep(app: Any, screen: Screen, nodes: tuple[str, ...], timeout: float) -> int:
    """Evict idle backends now.

    At these nodes, or at all: those that were idle for longer than POOL_IDLE_TIMEOUT.

    Exits with 1 if a node does not answer.
    """
    found = Nodes(app, timeout)
    return told(screen, found.ask("pool_sweep", to=found.named(nodes) if nodes else None))


def told(screen: Screen, replies: Replies) -> int:
    """Show what each node has answered to a control command; return the exit code."""
    screen.tell({"answers": replies.answers, "no_answer": replies.missing})
    wrong = bool(replies.missing) or not replies.answers
    for node, reply in sorted(replies.answers.items()):
        wrong |= "error" in reply
        screen.show(plain(f"{node}: {reply.get('error') or reply.get('ok')}"))
    for node in replies.missing:
        screen.note(f"{node} does not answer", "bold red")
    if not replies.answers and not replies.missing:
        screen.note("no node answers", "bold red")
    return WRONG if wrong else OK
