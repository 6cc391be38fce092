"""``pool top``: nodes, the busiest backends and what runs, again and again."""

import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from time import localtime, monotonic, sleep, strftime, time
from typing import Any, NamedTuple

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text

from pool.cli import backends, status
from pool.cli.command import OK, command, timeout_option
from pool.cli.nodes import Nodes, Problem
from pool.cli.overview import Overview
from pool.cli.screen import Cell, Screen, grid
from pool.cli.words import count, duration, percent, plain

RUNNING = ("key", "task", "node", "for", "id")
NODES = ("node", "state", "shards", "backends", "busy", "running", "waiting", "warm")
LEAST = 3
"""Rows of each table at least, however low the terminal is."""


@command
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between looks.",
)
@click.option("--count", "looks", type=click.IntRange(min=1), metavar="N", help="End after N looks.  [default: never]")
@timeout_option
def top(app: Any, screen: Screen, interval: float, looks: int | None, timeout: float) -> int:
    """Watch nodes, busy backends and running tasks.

    q or Ctrl-C ends.

    With --json it looks once.
    """
    app.loader.import_default_modules()  # a task knows which of its arguments is the key
    if screen.as_json:
        screen.tell(Look.of(Nodes(app, timeout), limit=50).told())
        return OK
    full = screen.out.is_terminal and not screen.out.is_dumb_terminal
    frame = Live(console=screen.out, screen=full, auto_refresh=False, transient=full) if full else nullcontext()
    try:
        with _keys() as pressed, frame as live:
            left = looks
            while left is None or left > 0:
                began = monotonic()
                shown = _frame(app, screen, timeout)
                if live is not None:
                    live.update(shown, refresh=True)
                else:
                    screen.show(shown, "")
                left = None if left is None else left - 1
                if left == 0 or pressed(max(0.05, interval - (monotonic() - began))):
                    break
    except KeyboardInterrupt:
        pass
    return OK


class Look(NamedTuple):
    """What is seen at one moment."""

    overview: Overview
    rows: list[dict[str, Any]]
    total: int
    running: list[dict[str, Any]]

    @classmethod
    def of(cls, nodes: Nodes, limit: int) -> "Look":
        """Ask all nodes. Raises `Problem`."""
        overview = Overview.of(nodes)
        there = [node["node"] for node in overview.nodes if node["answers"]]
        if not there:
            return cls(overview, [], 0, [])
        rows, total = backends.busiest(nodes.ask("pool_backends", to=there, limit=limit), limit)
        active = nodes.ask("active", to=there).answers
        running = [_task(nodes.app, node, task) for node, tasks in active.items() for task in tasks]
        return cls(overview, rows, total, sorted(running, key=lambda task: -task["seconds"]))

    def told(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {**self.overview.told(), "backends": self.rows, "backends_total": self.total, "running": self.running}


def _task(app: Any, node: str, told: dict[str, Any]) -> dict[str, Any]:
    """One task of Celery's ``active``, and its key; never its arguments: there may be secrets among them."""
    task = app.tasks.get(told.get("name"))
    key = None
    if getattr(task, "key", None) is not None:
        try:
            key = task.key_argument(told.get("args") or (), told.get("kwargs") or {})
        except Exception:  # another version of the task runs there
            key = None
    started = told.get("time_start")
    seconds = max(0.0, time() - started) if isinstance(started, int | float) else 0.0
    return {"task_id": told.get("id"), "name": told.get("name"), "key": key, "node": node, "seconds": round(seconds, 3)}


def _frame(app: Any, screen: Screen, timeout: float) -> Any:
    head = Text(f"{strftime('%H:%M:%S', localtime())}  q ends", "dim")
    try:
        look = Look.of(Nodes(app, timeout), limit=max(LEAST, screen.out.height))
    except Problem as problem:  # a broker that is away may come back
        return Group(head, Text(f"! {plain(problem)}", "bold red"))
    return Group(head, *_parts(look, screen.out.width, screen.out.height - 1))


def _parts(look: Look, width: int, height: int) -> Iterator[Any]:
    overview = look.overview
    narrow = width < 70  # there a row takes two lines
    per_row = 2 if narrow else 1
    yield status.totals(overview)
    yield grid(width, NODES, [_node(node) for node in overview.nodes], right=NODES[2:])
    for problem in overview.problems:
        yield Text(f"! {plain(problem)}", "bold red")
    used = 6 + per_row * len(overview.nodes) + len(overview.problems) + (2 if narrow else 0)
    room = max(2 * LEAST, (height - used) // per_row)
    first = min(len(look.rows), max(LEAST, room - min(len(look.running), room // 2)))
    yield Text(f"\nBackends: {count(look.total)}, the busiest first", "bold")
    yield backends.table(look.rows[:first], width) if look.rows else "none"
    shown = look.running[: max(LEAST, room - first)]
    yield Text(f"\nTasks that run: {count(len(look.running))}", "bold")
    yield grid(width, RUNNING, [_running(task) for task in shown], right=("for",)) if shown else "none"


def _node(node: dict[str, Any]) -> list[Cell]:
    style = {"no answer": "bold red", "draining": "yellow"}.get(node["state"], "green")
    return [
        node["node"],
        (node["state"], style),
        *(count(node.get(name)) for name in ("shards", "total", "busy", "running", "waiting")),
        percent(node.get("hit_rate")),
    ]


def _running(task: dict[str, Any]) -> list[Cell]:
    name = str(task["name"]).rpartition(".")[2]
    return [str(task["key"] or "-"), name, task["node"], duration(task["seconds"]), str(task["task_id"])]


@contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds and says whether q was pressed meanwhile."""
    if not sys.stdin.isatty():
        yield sleep
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> bool:
        until = monotonic() + seconds
        while (left := until - monotonic()) > 0:
            if select.select([descriptor], [], [], left)[0]:
                typed = os.read(descriptor, 64)
                if not typed or b"q" in typed.lower():
                    return True
        return False

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
