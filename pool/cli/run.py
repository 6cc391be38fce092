"""``pool run KEY -- CMD``: a build, as if it ran here: its output, its exit code, Ctrl-C."""

import shlex
from typing import Any

import click

from pool.cli.command import INTERRUPTED, command
from pool.cli.nodes import Problem
from pool.cli.outcome import Outcome, wait_for
from pool.cli.output import Output
from pool.cli.screen import Screen
from pool.cli.send import send
from pool.cli.signals import CancelOnInterrupt
from pool.errors import CommandFailed, ConfigError
from pool.keys import check_key
from pool.live import Piece, follow

TASK = "tasks.builds.run_build"
RESULT_PATIENCE = 10.0
"""Seconds for the result to arrive after the live output has told the end."""


@command
@click.argument("key")
@click.argument("words", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--project", help="Work below projects/PROJECT of the key.")
@click.option("--cwd", metavar="FOLDER", help="Where, relative to the key's folder or the project.")
@click.option("--env", "variables", metavar="NAME=VALUE", multiple=True, help="A variable; can be given again.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Then the command is killed, and the exit code is 124.  [default: never]",
)
@click.option("--shell", is_flag=True, help="Take several words for one line of shell, too.")
@click.option("--raw", is_flag=True, help="Let escape sequences act on the terminal.")
def run(
    app: Any,
    screen: Screen,
    key: str,
    words: tuple[str, ...],
    project: str | None,
    cwd: str | None,
    variables: tuple[str, ...],
    timeout: float | None,
    shell: bool,
    raw: bool,
) -> int:
    """Run COMMAND on the warm backend of KEY, wherever that is, and follow its output.

    One word is taken for a line of shell: 'make && make test'. Exits with the command's code; 124: it ran into its
    timeout; 130: it was cancelled. Ctrl-C cancels it; a second one leaves it alone.
    """
    options = {"project": project, "cwd": cwd, "env": _environment(variables), "timeout": timeout}
    line = " ".join(words) if shell or len(words) == 1 else shlex.join(words)
    given = {name: value for name, value in options.items() if value is not None}
    task_id = send(app, TASK, (check_key(key), line), given)
    build = _Build(app, screen, Output(screen, raw=raw), task_id)
    try:
        with CancelOnInterrupt(app, screen, task_id):
            found = build.followed()
    except KeyboardInterrupt:
        screen.fail(f"left alone: task {task_id}")
        return INTERRUPTED
    screen.tell(_told(key, task_id, found))
    if found.error and not (build.live and isinstance(found.result, CommandFailed)) and not screen.as_json:
        screen.fail(found.error)
    return found.exit_code


class _Build:
    """A build that was sent."""

    def __init__(self, app: Any, screen: Screen, output: Output, task_id: str) -> None:
        self._app = app
        self._screen = screen
        self._output = output
        self._task_id = task_id
        self._talks = screen.err.is_terminal and not screen.as_json
        self.live = True
        """Its output was shown as it came."""

    def followed(self) -> Outcome:
        """Show what it writes until it has ended; return what became of it. Raises `Problem`."""
        self._say(f"task {self._task_id}")
        end: Piece | None = None
        try:
            for piece in follow(self._task_id, app=self._app):
                end = piece if piece.kind == "end" else None
                self._piece(piece)
        except ConfigError as error:
            self.live = False
            self._say(f"{error}: the output comes at the end")
        found = self._outcome(end)
        if not self.live and isinstance(found.result, dict) and not self._screen.as_json:
            self._output.write(Piece("stdout", str(found.result.get("output", "")).encode(), 0))
        return found

    def _outcome(self, end: Piece | None) -> Outcome:
        try:
            found = wait_for(self._app, self._task_id, None if end is None else RESULT_PATIENCE)
        except Problem:
            if end is None:
                raise
            found = Outcome("", None)
        if found.ended or end is None:
            return found
        # The result backend does not know, or is away: what the worker told its followers is as good.
        code = end.facts.get("exit_code") or (0 if end.facts.get("state") == "SUCCESS" else 1)
        return Outcome(str(end.facts.get("state")), {"exit_code": code} if code == 0 else CommandFailed("", code))

    def _piece(self, piece: Piece) -> None:
        if piece.kind == "begin":
            self._say(f"runs at {piece.facts.get('node', 'a node')}")
        elif piece.kind == "end":
            state, bytes_ = piece.facts.get("state"), piece.facts.get("bytes")
            if state == "RETRY":
                self._screen.note("this attempt has ended: it is tried again", "yellow")
            elif bytes_ is not None:
                self._say(f"{state}")
        elif not self._screen.as_json:
            self._output.write(piece)

    def _say(self, text: str) -> None:
        """Tell somebody who sits there how it goes; a script gets nothing but the output."""
        if self._talks:
            self._screen.note(text, "dim")


def _environment(variables: tuple[str, ...]) -> dict[str, str] | None:
    found = {}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or not name:
            raise Problem(f"--env {variable!r} is not of the form NAME=VALUE")
        found[name] = value
    return found or None


def _told(key: str, task_id: str, found: Outcome) -> dict[str, Any]:
    result = found.result if isinstance(found.result, dict) else None
    return {
        "key": key,
        "task_id": task_id,
        "state": found.state,
        "exit_code": found.exit_code,
        "error": found.error or None,
        "result": result,
    }
