"""What all commands have in common: ``--json``, ``--timeout``, what becomes of errors and of Ctrl-C."""

import sys
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import click

from pool.cli.nodes import Problem
from pool.cli.screen import Screen
from pool.errors import PoolError

TIMEOUT = 1.0
"""Seconds that nodes get to answer."""
INTERRUPTED = 130

OK, WRONG, UNUSABLE = 0, 1, 2
"""Exit codes: all is well; something is wrong or missing; the question could not be asked."""

timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="How long nodes may take to answer; those who are there are not waited for longer than they need.",
)
"""For commands that ask nodes."""


def _with_pool(app: Any) -> Any:
    if getattr(app, "warm_pool", None) is None:
        raise Problem(f"the app {app.main!r} has no pool: pool.install(app) was not called (see -A)")
    return app


def command(function: Callable[..., int]) -> click.Command:
    """Make a command of a function of the app, the screen and its options which returns the exit code."""

    @click.pass_obj
    def run(obj: Any, /, *, as_json: bool, **options: Any) -> None:
        screen = Screen(as_json=as_json, no_color=obj.no_color, quiet=obj.quiet)
        try:
            code = function(_with_pool(obj.app), screen, **options)
        except Problem as problem:
            screen.fail(str(problem))
            code = problem.code
        except PoolError as error:
            screen.fail(str(error))
            code = UNUSABLE
        except KeyboardInterrupt:
            code = INTERRUPTED
        sys.stdout.flush()
        sys.exit(code)

    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON value, and nothing else.")
    update_wrapper(run, function)
    return click.command(as_json(run))
