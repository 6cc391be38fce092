"""What a warm, idle connection holds in memory, on our side and on the host, and what a command that waits holds."""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import psutil

from benchmarks.exec_peers import OURS
from benchmarks.harness import REPOSITORY, Report, remote_folder, scratch, ssh_server
from benchmarks.memory_child import KINDS, WAITING
from benchmarks.peers import Target, target_of

MANY = ("ours, helper", "ours, channel", "asyncssh")  # 1,000 of these, 50 of the others
CLIENT_TARGET = 1.15  # ours / asyncssh
HELPER_TARGET = 15.0  # MB of the helper's process on the host
HOST_MB = 12.0  # what one connection may take on the host: with too little memory there are fewer


def measure(*, quick: bool) -> Report:
    most = int(psutil.virtual_memory().available / 1e6 / 2 / HOST_MB)
    count, few = (20, 5) if quick else (min(most, 1_000), 50)
    report = Report("memory", f"{count:,} warm idle connections in one process, {WAITING} commands that wait on one")
    with scratch() as folder, ssh_server(folder) as (which, info):
        report.title += f"; {which}"
        target = target_of(info, remote_folder(folder))
        told = {name: _measured(name, target, count if name in MANY else few) for name in KINDS}
    report.raw["told"] = told
    for name, one in told.items():
        if "missing" in one:
            report.add(name, None, "", remark=one["missing"])
            continue
        report.add(f"{name}: a connection, our side", one["kb"], "KB", remark=f"of {one['count']}: {one['of']}")
        if one.get("waiting_kb") is not None:
            report.add(f"{name}: a waiting command, our side", one["waiting_kb"], "KB")
        report.add(f"{name}: a connection, sshd on the host", one["sshd_mb"], "MB", remark="its share (PSS)")
        if one["helpers"]:
            required = HELPER_TARGET if name == OURS else None
            report.add(f"{name}: its process on the host", one["helper_mb"], "MB", required, remark="resident (RSS)")
            report.add(f"{name}: ... its share", one["helper_pss_mb"], "MB", remark="PSS")
    for ours in ("ours, helper", "ours, channel"):
        if "kb" in told[ours] and "kb" in told["asyncssh"]:
            value = told[ours]["kb"] / told["asyncssh"]["kb"]
            report.add(f"{ours} / asyncssh, our side", value, "x", CLIENT_TARGET if ours == OURS else None)
    report.notes.append(
        "Our side: how the resident memory of a process grows with its connections, after the first tenth of them; "
        "with mitogen the ssh process of each connection is counted, too. RSS counts pages that processes share, PSS "
        "divides them."
    )
    return report


def _measured(name: str, target: Target, count: int) -> dict[str, Any]:
    """Have a process of its own make *count* connections, and look at the host meanwhile."""
    fields = {key: str(value) for key, value in asdict(target).items() if key != "way"}
    command = [sys.executable, "-m", "benchmarks.memory_child", name, json.dumps(fields), str(count)]
    before = _on_host(set())
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told: dict[str, Any] = json.loads(process.stdout.readline() or '{"missing": "its process failed"}')
        if "missing" not in told:
            told |= _host_side({process.pid}, set(before), count)
            process.stdin.write("wait\n")
            process.stdin.flush()
            told |= json.loads(process.stdout.readline() or "{}")
        process.stdin.close()
        process.wait(120)
    return told


def _on_host(clients: set[int]) -> dict[int, psutil.Process]:
    """Every process below this one (the server runs here) that is not one of *clients* or below them."""
    below = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for client in clients & set(below):
        for process in [below[client], *below[client].children(recursive=True)]:
            below.pop(process.pid, None)
    return below


def _host_side(clients: set[int], before: set[int], count: int) -> dict[str, Any]:
    sshd, helpers, resident = 0.0, [], []
    for pid, process in _on_host(clients).items():
        if pid in before:
            continue
        with suppress(psutil.Error):
            memory = process.memory_full_info()
            if process.name().startswith("sshd"):
                sshd += memory.pss
            else:
                helpers.append(memory.pss)
                resident.append(memory.rss)
    return {
        "sshd_mb": sshd / count / 1e6,
        "helpers": len(helpers),
        "helper_mb": max(resident, default=0) / 1e6,
        "helper_pss_mb": sum(helpers) / max(1, len(helpers)) / 1e6,
    }
