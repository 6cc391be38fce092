"""`run_build.delay(user, "true").get()` on a warm backend, against a task that connects for itself."""

from time import perf_counter, sleep
from typing import Any

from benchmarks.harness import Report, interleaved, p50, ratio, spread
from benchmarks.nodes import nodes

TARGET = 8.0  # times faster
SETTLE = 0.05  # seconds before each task: sshd still clears up after a connection that was closed


def measure(*, quick: bool) -> Report:
    rounds = 5 if quick else 60
    report = Report("warm_build", "one task after the other, end to end: delay().get(), same worker")
    with nodes("0-63") as stage:
        from benchmarks.build_app import cold_build, nothing
        from tasks import run_build

        def warm() -> float:
            taken, result = _timed(run_build, "user-1", "true")
            assert result["warm"] or not ready, result
            exec_only.append(1e3 * result["duration_s"])
            return taken

        def cold() -> float:
            return _timed(cold_build, "true")[0]

        exec_only: list[float] = []
        contestants = {"cold": cold, "warm": warm, "nothing": lambda: _timed(nothing)[0]}
        ready = False
        interleaved(contestants, 3)
        ready = True
        exec_only.clear()
        told = interleaved(contestants, rounds)
    report.title += f", {stage.which}"
    report.raw["ms"] = {**told, "exec of the warm one": exec_only}
    report.add("connection made for each task / warm backend", ratio(told["cold"], told["warm"]), "x", TARGET,
               least=True, remark=spread([a / b for a, b in zip(told["cold"], told["warm"], strict=True)]))  # fmt: skip
    report.add("run_build, warm", p50(told["warm"]), "ms", remark=spread(told["warm"]))
    report.add("a task with its own asyncssh connection", p50(told["cold"]), "ms", remark=spread(told["cold"]))
    report.add("... of which the command on the host, as run_build measures it", p50(exec_only), "ms")
    report.add(
        "an empty task: Celery, broker and result alone", p50(told["nothing"]), "ms", remark=spread(told["nothing"])
    )
    net = [(c - n) / (w - n) for c, w, n in zip(told["cold"], told["warm"], told["nothing"], strict=True) if w > n]
    report.add("the same ratio without what the empty task costs", p50(net), "x")
    report.add("... p95: warm", _p95(told["warm"]), "ms")
    report.add("... p95: own connection", _p95(told["cold"]), "ms")
    report.notes.append("Both pay for Celery, the broker and the result; the login shell of the account is /bin/sh.")
    return report


def _timed(task: Any, *args: str) -> tuple[float, dict[str, Any]]:
    sleep(SETTLE)
    started = perf_counter()
    result = task.delay(*args).get(timeout=30)
    return 1e3 * (perf_counter() - started), result


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]
