"""``pool backends``: what is open, the busiest first."""

from collections.abc import Iterable
from typing import Any

import click

from pool.cli.command import OK, WRONG, command, timeout_option
from pool.cli.nodes import Nodes, Replies
from pool.cli.screen import Cell, Screen, grid
from pool.cli.words import count, duration
from pool.manager import DEFAULT_AGENT

COLUMNS = ("key", "backend", "node", "shard", "state", "for", "users", "waiting", "uses", "age", "MB")
NUMBERS = ("shard", "for", "users", "waiting", "uses", "age", "MB")


@command
@click.option("--key", metavar="PATTERN", help="Only those of keys that match, such as 'acme:*'.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many at most.")
@timeout_option
def backends(app: Any, screen: Screen, key: str | None, limit: int, timeout: float) -> int:
    """List backends, the busiest first.

    Exits with 1 if a node does not answer.
    """
    replies = Nodes(app, timeout).ask("pool_backends", limit=limit, key=key)
    rows, total = busiest(replies, limit)
    screen.tell({"total": total, "shown": len(rows), "backends": rows, "no_answer": replies.missing})
    screen.show(table(rows, screen.out.width) if rows else "no backends")
    if len(rows) < total:
        screen.show(f"{count(len(rows))} of {count(total)} are shown (--limit)")
    for node in replies.missing:
        screen.note(f"{node} does not answer: its backends are not shown", "bold red")
    return WRONG if replies.missing else OK


def busiest(replies: Replies, limit: int) -> tuple[list[dict[str, Any]], int]:
    """Put the rows of all nodes together; return the first ones, and how many there are."""
    rows = [{**row, "node": node} for node, reply in replies.answers.items() for row in reply.get("backends", ())]
    rows.sort(key=lambda row: (-(row.get("busy_s") or -1.0), -(row.get("waiters") or 0), row.get("idle_s") or 0.0))
    return rows[:limit], sum(reply.get("total", 0) for reply in replies.answers.values())


def table(rows: Iterable[dict[str, Any]], width: int) -> Any:
    """Lay backends out."""
    return grid(width, COLUMNS, [_row(row) for row in rows], right=NUMBERS)


def _row(row: dict[str, Any]) -> list[Cell]:
    return [
        row["key"],
        name(row),
        row["node"],
        count(row.get("shard")),
        state(row),
        duration(row["busy_s"] if row.get("busy_s") is not None else row.get("idle_s")),
        count(row.get("users")),
        count(row.get("waiters")),
        count(row.get("uses")),
        duration(row.get("age_s")),
        count(row.get("weight_mb")) if row.get("weight_mb") else "",
    ]


def name(row: dict[str, Any]) -> str:
    """Return what it is: its agent, or the kind of a key's plain backend."""
    agent, kind = row.get("agent"), row.get("kind")
    return str(kind or agent if agent in (None, DEFAULT_AGENT) else agent)


def state(row: dict[str, Any]) -> tuple[str, str]:
    """Say what a backend does, and in colour how well it is."""
    if row.get("status") not in (None, "", "connected", "connecting") and row["state"] in ("idle", "busy"):
        return f"{row['state']}, {row['status']}", "bold red"
    return row["state"], {"busy": "yellow", "idle": "green"}.get(row["state"], "")
