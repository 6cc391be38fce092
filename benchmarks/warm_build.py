"""`run_build.delay(user, "true").get()` on a warm backend, against a task that connects for itself."""

from time import perf_counter
from typing import Any

from benchmarks.harness import Report, interleaved, p50, ratio, spread
from benchmarks.nodes import nodes

TARGET = 8.0  # times faster


def measure(*, quick: bool) -> Report:
    rounds = 5 if quick else 60
    report = Report("warm_build", "one task after the other, end to end: delay().get(), same worker")
    with nodes("0-63") as stage:
        from benchmarks.build_app import cold_build
        from tasks import run_build

        def warm() -> float:
            taken, result = _timed(run_build, "user-1", "true")
            assert result["warm"] or not ready, result
            return taken

        def cold() -> float:
            return _timed(cold_build, "true")[0]

        ready = False
        interleaved({"warm": warm, "cold": cold}, 3)
        ready = True
        told = interleaved({"cold": cold, "warm": warm}, rounds)
    report.title += f", {stage.which}"
    report.raw["ms"] = told
    report.add("connection made for each task / warm backend", ratio(told["cold"], told["warm"]), "x", TARGET,
               least=True, remark=spread([a / b for a, b in zip(told["cold"], told["warm"], strict=True)]))  # fmt: skip
    report.add("run_build, warm", p50(told["warm"]), "ms", remark=spread(told["warm"]))
    report.add("a task with its own asyncssh connection", p50(told["cold"]), "ms", remark=spread(told["cold"]))
    report.add("... p95: warm", _p95(told["warm"]), "ms")
    report.add("... p95: own connection", _p95(told["cold"]), "ms")
    report.notes.append("Both pay for Celery, the broker and the result; the login shell of the account is /bin/sh.")
    return report


def _timed(task: Any, *args: str) -> tuple[float, dict[str, Any]]:
    started = perf_counter()
    result = task.delay(*args).get(timeout=30)
    return 1e3 * (perf_counter() - started), result


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]
