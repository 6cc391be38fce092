"""``celery -A worker_config pool ...``: see the nodes and what they work on, and steer them. `docs/cli.md`.

Celery imports this module for every command of its own, so each command of ours is imported when it is used.
"""

import importlib

import click

_HOME = {
    "status": "status",
    "top": "top",
    "backends": "backends",
    "explain": "explain",
    "run": "run",
    "logs": "logs",
    "cancel": "cancel",
    "close": "close",
    "sweep": "sweep",
    "drain": "drain",
    "undrain": "drain",
    "doctor": "doctor",
}
"""Command -> module of this package, in the order in which help lists them."""


class Commands(click.Group):
    """The commands, by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        return list(_HOME)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _HOME:
            if ctx.resilient_parsing:  # a shell completes a line
                return None
            ctx.fail(f"no such command: {cmd_name!r}. There are: {', '.join(_HOME)}.")
        command: click.Command = getattr(importlib.import_module(f"pool.cli.{_HOME[cmd_name]}"), cmd_name)
        return command


@click.group(cls=Commands)
def pool() -> None:
    """See the nodes, their shards and backends, and steer them.

    Exit codes: 0 all is well; 1 something is wrong, or not everybody has answered; 2 wrong usage, or the broker cannot
    be reached. `run` exits with the code of its command.
    """
