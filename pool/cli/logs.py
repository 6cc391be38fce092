"""``pool logs TASK_ID``: what a task has written, and writes."""

from base64 import b64encode
from typing import Any

import click
from celery import states

from pool.cli.command import INTERRUPTED, OK, WRONG, command
from pool.cli.nodes import Problem, within
from pool.cli.outcome import outcome_of
from pool.cli.output import Output
from pool.cli.screen import Screen
from pool.live.follow import follow
from pool.live.format import Piece

PATIENCE = 10.0
"""Seconds for Redis to tell what it has, where nothing is followed."""


@command
@click.argument("task_id")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the task has ended.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="With -f: give up after so long without news.  [default: never]",
)
@click.option("--raw", is_flag=True, help="Let escape sequences act on the terminal.")
def logs(app: Any, screen: Screen, task_id: str, following: bool, timeout: float | None, raw: bool) -> int:
    """Show what a task has written.

    Its stdout comes on stdout, its stderr on stderr.

    Redis keeps the last POOL_LIVE_OUTPUT_MB of it for POOL_LIVE_TTL seconds. Exits with 1 if nothing is known of the
    task. Ctrl-C leaves; the task goes on.
    """
    output = Output(screen, raw=raw)
    kept = within(PATIENCE, lambda: list(follow(task_id, app=app, wait=False)), "Redis")
    if not any(piece.kind != "end" or "attempt" in piece.facts for piece in kept):
        _without_output(app, screen, task_id, kept, following=following)
        if kept or not following:
            screen.tell([])
            return OK
    if not following:
        return _shown(screen, output, kept)
    return _followed(app, screen, output, task_id, timeout)


def _without_output(app: Any, screen: Screen, task_id: str, kept: list[Piece], *, following: bool) -> None:
    """Say why there is no output. Raises `Problem` where nothing will come of it."""
    if kept:
        screen.note(f"task {task_id} has ended ({kept[-1].facts.get('state')}); its output is not kept any more")
        return
    state = outcome_of(app, task_id).state
    if state == states.PENDING and not following:
        raise Problem(
            f"nothing is known of task {task_id}: it has not begun, or its output and result have expired", WRONG
        )
    if following:
        screen.note(f"nothing of task {task_id} yet ({state}): waiting for it; Ctrl-C leaves", "dim")
    else:
        screen.note(f"task {task_id} has written nothing yet ({state})")


def _shown(screen: Screen, output: Output, pieces: list[Piece]) -> int:
    if screen.as_json:
        screen.tell([told(piece) for piece in pieces])
        return OK
    for piece in pieces:
        output.write(piece)
    return OK


def _followed(app: Any, screen: Screen, output: Output, task_id: str, timeout: float | None) -> int:
    collected = []
    try:
        for piece in follow(task_id, app=app, timeout=timeout):
            if screen.as_json:
                collected.append(told(piece))
            else:
                output.write(piece)
    except TimeoutError as error:
        raise Problem(str(error), WRONG) from None
    except KeyboardInterrupt:
        return INTERRUPTED
    screen.tell(collected)
    return OK


def told(piece: Piece) -> dict[str, Any]:
    """Return a piece for a program; what is no UTF-8 as ``base64`` instead of ``text``."""
    row: dict[str, Any] = {"kind": piece.kind}
    if piece.kind != "output":
        return {**row, **piece.facts}
    row |= {"stream": piece.stream, "offset": piece.offset, "skipped": piece.skipped}
    try:
        return {**row, "text": piece.data.decode()}
    except UnicodeDecodeError:
        return {**row, "base64": b64encode(piece.data).decode()}
