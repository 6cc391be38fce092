"""``python -m pool.demo``: run the demo; exit code 0 only if it shows what is promised."""

import argparse
import json
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import pool.demo
from pool.demo.affinity import Affinity
from pool.demo.agents import ENVIRONMENT, Conversations, check_agents
from pool.demo.stage import DemoError, Stage
from pool.demo.takeover import Takeover


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pool.demo", description=pool.demo.__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kill", action="store_true", help="kill -9 one of three nodes while builds run")
    which.add_argument("--agents", action="store_true", help="chat with two real coding agents, offline")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--keep", action="store_true", help="let the nodes run on until Ctrl-C")
    parser.add_argument("--users", type=int, default=12, help="not with --agents")
    parser.add_argument("--tasks", type=int, default=300, help="builds in all; not with --kill, --agents")
    parser.add_argument("--folder", type=Path, default=Path(".pool/demo"), help="made anew; keeps the logs")
    options = parser.parse_args()
    if options.users < 1 or options.tasks < 3 * options.users:
        parser.error("--users must be 1 or more, and --tasks at least 3 for each user")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    console = Console(stderr=options.json)
    try:
        if options.agents:
            check_agents()
        with Stage(options.folder, console, ENVIRONMENT if options.agents else None) as stage:
            demo = _demo(options, stage)
            report = demo.run()
            print(json.dumps(asdict(report))) if options.json else demo.show(report)
            if options.keep:
                _keep(stage)
    except KeyboardInterrupt:
        console.print("interrupted; everything was stopped")
        return 130
    except DemoError as error:
        console.print(f"[red]{error}")
        return 1
    if not report.ok:
        console.print(f"[red]not as promised; logs are in {options.folder}")
    return 0 if report.ok else 1


def _demo(options: argparse.Namespace, stage: Stage) -> Any:
    if options.agents:
        return Conversations(stage)
    return Takeover(stage, options.users) if options.kill else Affinity(stage, options.users, options.tasks)


def _keep(stage: Stage) -> None:
    """Let somebody look around, until Ctrl-C."""
    celery = f"POOL_DATA_DIR={stage.shown_folder} {Path(sys.executable).parent / 'celery'} -A worker_config"
    stage.console.print("\nEverything runs on until Ctrl-C. In another terminal, here:", highlight=False)
    for command in ("pool status", "pool top", "pool explain user-1", "pool run user-1 -- uname -a", "flower"):
        stage.console.print(f"  {celery} {command}", highlight=False, soft_wrap=True)
    with suppress(KeyboardInterrupt):
        signal.pause()


def _interrupt(number: int, _frame: object) -> None:
    """TERM and HUP end the demo as Ctrl-C does; a second one does not disturb the clean-up."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
