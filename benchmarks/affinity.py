"""200 users, 20 tasks each, two nodes: does every user have one process and one connection?"""

import random
from collections import defaultdict
from time import perf_counter

from benchmarks.harness import Report, p50
from benchmarks.nodes import nodes

TIMEOUT = 180.0  # seconds for all tasks of the run


def measure(*, quick: bool) -> Report:
    users, each = (20, 5) if quick else (200, 20)
    report = Report("affinity", f"{users} users x {each} tasks, two nodes with half of the shards each")
    with nodes("0-31", "32-63") as stage:
        from tasks import run_build

        keys = [f"user-{number}" for number in range(users) for _ in range(each)]
        random.Random(7).shuffle(keys)  # the same order each time
        logins_before = stage.info.count_logins()
        started = perf_counter()
        waiting = [run_build.delay(key, "true") for key in keys]
        results = [result.get(timeout=TIMEOUT) for result in waiting]
        taken = perf_counter() - started
        logins = stage.info.count_logins() - logins_before
    pids: dict[str, set[int]] = defaultdict(set)
    for result in results:
        pids[result["key"]].add(result["pid"])
    warm = sum(result["warm"] for result in results)
    report.title += f", {stage.which}"
    report.raw |= {"seconds": taken, "logins": logins, "warm": warm, "tasks": len(results)}
    report.raw["tasks by pid"] = {pid: sum(r["pid"] == pid for r in results) for pid in {r["pid"] for r in results}}
    report.add("SSH logins, counted by the server", logins, "logins", users)
    report.add("users whose tasks all ran in one process", sum(len(p) == 1 for p in pids.values()), "users", users,
               least=True)  # fmt: skip
    report.add("processes that ran tasks", len(report.raw["tasks by pid"]), "", 2.0, least=True)
    most = 100 * (1 - users / len(results))
    report.add("warm hits", 100 * warm / len(results), "%", remark=f"{most:g} % is all but each user's first task")
    report.add("tasks that succeeded", sum(r["exit_code"] == 0 for r in results), "tasks", len(results), least=True)
    report.add("tasks per second, connects included", len(results) / taken, "/s")
    report.add("exec alone, p50", 1e3 * p50([r["duration_s"] for r in results if r["warm"]]), "ms",
               remark="32 tasks at a time on each node")  # fmt: skip
    return report
