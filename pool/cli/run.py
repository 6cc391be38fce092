"""``pool run KEY -- CMD``: a build, as if it ran here: its output, its exit code, Ctrl-C."""

import shlex
from typing import IO, Any

import click
from celery import states

from pool.cli.command import INTERRUPTED, command
from pool.cli.nodes import Problem
from pool.cli.outcome import Outcome, wait_for
from pool.cli.output import Kept, Output
from pool.cli.screen import Screen
from pool.cli.send import send
from pool.cli.signals import CancelOnInterrupt
from pool.cli.words import duration
from pool.errors import CommandFailed, ConfigError
from pool.keys import check_key
from pool.live.follow import follow
from pool.live.format import Piece

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
@click.option("--stdin", type=click.File("rb"), metavar="FILE", help="What the command reads; '-': what this one does.")
@click.option("--durable", is_flag=True, help="It outlives its worker and connection: it runs once, whatever happens.")
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
    stdin: IO[bytes] | None,
    durable: bool,
    shell: bool,
    raw: bool,
) -> int:
    """Run a command on a key's warm backend.

    Its output is shown as it comes. One word is taken for a line of shell: 'make && make test'. Exits with the
    command's code; 124: it ran into its timeout; 130: it was cancelled. Ctrl-C cancels it; a second one leaves it
    alone.
    """
    options = {"project": project, "cwd": cwd, "env": _environment(variables), "timeout": timeout}
    options["stdin"] = None if stdin is None else stdin.read().decode("utf-8", "surrogateescape")
    options["durable"] = durable or None
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
    screen.tell({**_told(key, task_id, found), **build.kept.told()})
    build.say_end(found)
    return found.exit_code


class _Build:
    """A build that was sent."""

    def __init__(self, app: Any, screen: Screen, output: Output, task_id: str) -> None:
        self._app = app
        self._screen = screen
        self._output = output
        self._task_id = task_id
        self._talks = screen.err.is_terminal and not screen.as_json
        self._attempt: str | None = None
        self._live = True
        self.kept = Kept()

    def followed(self) -> Outcome:
        """Show what it writes until it has ended; return what became of it. Raises `Problem`."""
        self._say(f"task {self._task_id}")
        end: Piece | None = None
        try:
            for piece in follow(self._task_id, app=self._app):
                end = piece if piece.kind == "end" else None
                self._piece(piece)
        except ConfigError as error:
            self._live = False
            self._screen.note(f"{error}: the output comes at the end", "yellow")
        found = self._outcome(end)
        if not self._live and isinstance(found.result, dict):
            self._write(Piece("stdout", str(found.result.get("output", "")).encode(), 0))
        return found

    def say_end(self, found: Outcome) -> None:
        """Tell how it ended; of a command that failed, its output has told."""
        if self._screen.as_json:
            return
        if found.error and not (self._live and isinstance(found.result, CommandFailed)):
            self._screen.fail(found.error)
        told = [f"exit code {found.exit_code}"]
        if isinstance(found.result, dict) and "duration_s" in found.result:
            told += [f"after {duration(found.result['duration_s'])}", "warm" if found.result.get("warm") else "cold"]
        self._say(", ".join(told))

    def _write(self, piece: Piece) -> None:
        if self._screen.as_json:
            self.kept.add(piece)
        else:
            self._output.write(piece)

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
            again = ", again" if self._attempt else ""
            self._attempt = piece.facts.get("attempt")
            self._say(f"runs at {piece.facts.get('node', 'a node')}{again}")
        elif piece.kind == "output":
            self._write(piece)
        elif piece.facts.get("state") not in states.READY_STATES and piece.facts.get("attempt") == self._attempt:
            self._screen.note(f"this attempt has ended ({piece.facts.get('state')}): it is tried again", "yellow")

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
