"""``pool cancel TASK_ID``: end a task that runs, or see to it that one that waits never starts."""

import json
from typing import Any, NamedTuple

import click
from celery import states

from pool.cli.command import OK, WRONG, command, timeout_option
from pool.cli.nodes import Nodes, Problem, Replies, within
from pool.cli.outcome import outcome_of
from pool.cli.screen import Screen
from pool.cli.words import plain
from pool.embedded import is_redis

LOOKED_AT = 1000
"""Messages of each queue among which a task is looked for."""


class Cancelled(NamedTuple):
    """What came of it."""

    found: str
    """``running``, ``waiting``, ``over``, ``unknown`` or ``other`` (it is no task of the pool)."""
    node: str | None
    message: str
    no_answer: list[str]

    @property
    def ok(self) -> bool:
        """Whether it ends, or never starts."""
        return self.found in ("running", "waiting")


@command
@click.argument("task_id")
@click.option("--reason", help="Told to whoever waits for the task.")
@timeout_option
def cancel(app: Any, screen: Screen, task_id: str, reason: str | None, timeout: float) -> int:
    """End a task, or keep it from starting.

    What it runs is killed; its backend stays warm.

    Exits with 1 if there was nothing to cancel.
    """
    found = cancelled(Nodes(app, timeout), task_id, reason)
    screen.tell({"task_id": task_id, "ok": found.ok, **found._asdict()})
    screen.show(plain(found.message))
    if not found.ok:
        for node in found.no_answer:
            screen.note(f"{node} does not answer: if the task runs there, it goes on", "bold red")
    return OK if found.ok else WRONG


def cancelled(nodes: Nodes, task_id: str, reason: str | None = None) -> Cancelled:
    """Tell all nodes, and say what they know of the task. Raises `Problem`."""
    state = _state(nodes, task_id)  # before: nodes write down as revoked what they do not have
    if state in states.READY_STATES:
        return Cancelled("over", None, f"{task_id} is over ({state})", [])
    replies = nodes.ask("pool_cancel", task_id=task_id, **({"reason": reason} if reason else {}))
    return _running(replies, task_id) or _waiting(nodes, replies, task_id)


def _state(nodes: Nodes, task_id: str) -> str:
    try:
        return str(outcome_of(nodes.app, task_id, nodes.timeout).state)
    except Problem:  # the nodes know better anyway
        return str(states.PENDING)


def _running(replies: Replies, task_id: str) -> Cancelled | None:
    missing = replies.missing
    for node, reply in replies.answers.items():
        if reply.get("found") == "running" and "ok" in reply:
            return Cancelled("running", node, f"{task_id} was running at {node} and is being cancelled", missing)
    for node, reply in replies.answers.items():
        if reply.get("found") == "waiting":
            return Cancelled("waiting", node, f"{task_id} was waiting at {node} and will not start", missing)
    for node, reply in replies.answers.items():
        if reply.get("error"):
            return Cancelled("other", node, f"{node}: {reply['error']}", missing)
    return None


def _waiting(nodes: Nodes, replies: Replies, task_id: str) -> Cancelled:
    """No node has it: it is in a queue, or there is none. Those who answered will not start it."""
    missing = replies.missing
    queue = _queue_of(nodes, task_id)
    if queue is not None and replies.answers and not missing:
        return Cancelled("waiting", None, f"{task_id} was waiting in {queue} and will not start", missing)
    if queue is not None:
        return Cancelled("unknown", None, f"{task_id} waits in {queue}, and not every node has answered", missing)
    return Cancelled("unknown", None, f"{task_id} is unknown: no node has it, and it has no result", missing)


def _queue_of(nodes: Nodes, task_id: str) -> str | None:
    """Return the shard queue in which the task is; None: in none, or the broker does not let one look."""
    url = str(nodes.settings.broker_url)
    if not is_redis(url) or ";" in url:
        return None
    names = [queue.name for queue in nodes.app.warm_pool.router.queues]

    def look() -> Any:
        with nodes.app.connection_for_read() as connection, connection.channel() as channel:
            client = channel.client
            filled = [name for name, length in zip(names, _lengths(client, names), strict=True) if length]
            for name in filled:
                if any(_is(message, task_id) for message in client.lrange(name, -LOOKED_AT, -1)):
                    return name
        return None

    try:
        found: str | None = within(2 * nodes.timeout, look, "the broker")
    except Problem:
        return None
    return found


def _lengths(client: Any, names: list[str]) -> list[int]:
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.llen(name)
        lengths: list[int] = pipe.execute()
    return lengths


def _is(message: bytes, task_id: str) -> bool:
    if task_id.encode() not in message:
        return False
    try:
        found: Any = json.loads(message)["headers"]["id"]
    except (ValueError, KeyError, TypeError):
        return False
    return bool(found == task_id)
