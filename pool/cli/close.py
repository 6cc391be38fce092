"""``pool close CHAT``: end all that a chat, or a user, has."""

from collections.abc import Iterator
from typing import Any

import click
from celery import states

from pool.cli.command import OK, WRONG, command
from pool.cli.nodes import Problem
from pool.cli.outcome import wait_for
from pool.cli.screen import Screen
from pool.cli.send import send
from pool.cli.words import plain
from pool.keys import check_key
from pool.manager import DEFAULT_AGENT

TASK = "pool.close_chat"


@command
@click.argument("chat")
@click.option("--no-wait", is_flag=True, help="Return as soon as it is enqueued.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for it: a turn that runs may finish first.",
)
def close(app: Any, screen: Screen, chat: str, no_wait: bool, timeout: float) -> int:
    """End all that a chat, or a user, has.

    Its backends, its agents' sessions and their worktrees. The task that does it goes to the chat's queue, so the
    order is kept. Exits with 1 if nothing was open, or it is not done in time.
    """
    task_id = send(app, TASK, (check_key(chat),))
    if no_wait:
        screen.tell({"key": chat, "task_id": task_id, "state": states.PENDING})
        screen.show(f"{chat} is closed when its turn comes: task {task_id}")
        return OK
    found = wait_for(app, task_id, timeout)
    if found.state != states.SUCCESS:
        problem = (
            found.error
            if found.ended
            else f"not done after {timeout:g} s, and goes on: task {task_id} is {found.state}"
        )
        raise Problem(f"closing {chat}: {problem}", WRONG)
    result = found.result if isinstance(found.result, dict) else {}
    screen.tell({**result, "task_id": task_id, "state": found.state})
    lines = list(_lines(result))
    screen.show("\n".join(plain(line) for line in lines or [f"{chat} had nothing open"]))
    return OK if lines else WRONG


def _lines(result: dict[str, Any]) -> Iterator[str]:
    for name in result.get("closed", ()):
        yield f"closed: {_shown(name)}"
    for name in result.get("retired", ()):
        yield f"closed when its task is done: {_shown(name)}"
    agents = result.get("agents") or {}
    for name, became in agents.items() if isinstance(agents, dict) else ():
        yield f"agent {name}: {became}"


def _shown(agent: str) -> str:
    return "its backend" if agent == DEFAULT_AGENT else agent
