"""Kill -9 of nodes with running agents: what is left 5 s later? And a node that lives: does it grow over 500 turns?"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import redis

from benchmarks.agent_site import ECHO_AGENT, AgentSite, agent_site
from benchmarks.harness import Report, Worker, p50, pong, remote_folder, spread, ssh_hosts, ssh_server
from pool.sharding.hashing import shard_of

AT_ONCE = 4  # nodes that run, and are killed, side by side
SHARDS = 64
PATIENCE = 5.0  # seconds after a kill
BOOT = 60.0  # seconds for all agents of a batch to run
FORKS = ("plain", "setsid", "daemon")
AGENTS = ("here", "there")
PROCESSES = AT_ONCE * len(AGENTS) * 2 * (1 + len(FORKS))  # of a batch: two of each agent at each node
LOOKS = 5  # at the processes: one that is in the middle of an exec shows no environment
TURNS, CHATS, EVERY = 500, 10, 25  # of the node that lives; it evicts its agents after so many turns


def measure(*, quick: bool) -> Report:
    kills = AT_ONCE if quick else 100
    report = Report("agent_kills", f"{kills} kill -9 of nodes with running agents, local and on a host")
    with agent_site() as site, ssh_server(site.folder) as (which, info):
        report.title += f" ({which})"
        killing = Killing(site, info)
        for batch in range(kills // AT_ONCE):
            killing.one_batch(batch)
        _add_kills(report, killing, kills)
        _survive(report, site, 50 if quick else TURNS)
    return report


def _add_kills(report: Report, killing: "Killing", kills: int) -> None:
    report.raw |= {"left": killing.left, "gone, s": killing.gone, "was left": killing.told}
    started = killing.started
    report.add(
        f"processes of agents, grandchildren included, left {PATIENCE:g} s after the kill",
        sum(killing.left),
        "processes",
        0.0,
        remark=f"of {started:,}, of {kills} nodes",
    )
    report.add("shells of ours that held them, left then", sum(killing.shells_left), "processes", 0.0)
    report.add(
        "kill -> the last process of its batch is gone, p50", p50(killing.gone), "s", remark=spread(killing.gone)
    )
    report.notes.append(
        f"{AT_ONCE} nodes at once, each with 2 agents on the worker and 2 on the host, one of which is in a turn; each"
        f" has started processes that ignore TERM: {', '.join(FORKS)}. The host is this machine, over a connection."
    )


class Killing:
    """Batches of nodes that are started, put to work, and killed."""

    def __init__(self, site: AgentSite, info: Any) -> None:
        self.site = site
        self.started = 0
        self.left: list[int] = []
        self.shells_left: list[int] = []
        self.gone: list[float] = []
        self.told: list[str] = []
        self._sshd = f"SSH_CONNECTION=127.0.0.1 {{}} 127.0.0.1 {info.port}".partition("{}")[2].encode()
        self._redis = redis.Redis.from_url(site.env["POOL_REDIS_URL"])
        self._stores = [site.store, _add_agents(site, info)]

    def one_batch(self, batch: int) -> None:
        """Start nodes with agents, kill them all, look what is left."""
        for store in self._stores:
            (store / "pids").unlink(missing_ok=True)
        share = SHARDS // AT_ONCE
        names = [f"node{batch}-{number}" for number in range(AT_ONCE)]
        nodes = [
            self.site.node(name, f"{number * share}-{(number + 1) * share - 1}", POOL_AGENT_STARTS="4")
            for number, name in enumerate(names)
        ]
        for number, (name, node) in enumerate(zip(names, nodes, strict=True)):
            node.until(partial(pong, self.site.app, name), "answers a ping")
            self._work(range(number * share, (number + 1) * share), f"{batch}-{number}")
        for node in nodes:
            node.until(lambda: self._pids() >= PROCESSES, "its agents run", BOOT)
        self.started += self._pids()
        seen = {p.pid for _ in range(LOOKS) for p in self._processes() if _has_mark(p)}
        if len(seen) < PROCESSES:  # then none that is left would be seen either
            raise RuntimeError(f"{PROCESSES} processes said that they run, {len(seen)} were seen")
        self._kill(nodes)
        self._redis.flushall()  # the turns that ran would run again

    def _work(self, shards: range, name: str) -> None:
        """Have chats of a node's shards say something; half of the agents do not come to an end with it."""
        keys = (key for n in range(100_000) if shard_of(key := f"chat-{name}-{n}", SHARDS) in shards)
        for agent in AGENTS:
            self.site.turn(next(keys), agent, "hello")
            self.site.send(next(keys), agent, "/hang")

    def _pids(self) -> int:
        """How many processes have said that they run."""
        return sum(len(file.read_text().splitlines()) for s in self._stores if (file := s / "pids").exists())

    def _kill(self, nodes: list[Worker]) -> None:
        killed = time.monotonic()
        for node in nodes:
            os.kill(node.pid, 9)
        for node in nodes:
            node.kill()
        seen = killed
        while (now := time.monotonic()) < killed + PATIENCE:
            if next(self._processes(), None) is not None:
                seen = now
            time.sleep(0.05)
        self.gone.append(seen - killed)
        found = {p.pid: p for _ in range(LOOKS) for p in self._processes()}
        agents = {pid for pid, process in found.items() if _has_mark(process)}
        self.left.append(len(agents))
        self.shells_left.append(len(found) - len(agents))
        self.told += [f"{process}" for process in found.values()]
        for process in found.values():
            with suppress(psutil.Error):
                process.kill()

    def _processes(self) -> Iterator[psutil.Process]:
        """What runs for nodes of this site: below them, or below the host's server. Told by the environment."""
        folder = str(self.site.folder).encode()
        for pid in psutil.pids():
            with suppress(OSError, psutil.Error):
                text = Path(f"/proc/{pid}/environ").read_bytes()
                if folder in text or self._sshd in text:
                    yield psutil.Process(pid)


def _has_mark(process: psutil.Process) -> bool:
    """Whether it is an agent, or started by one."""
    with suppress(psutil.Error):
        return "BENCH_AGENT" in process.environ()
    return False


def _add_agents(site: AgentSite, info: Any) -> Path:
    """Write the hosts file: agents that fork and one that does not, on the worker and on the host; its store there."""
    site.write_hosts(ssh_hosts(site.folder, info).read_text())
    there: Path = info.home / remote_folder(site.folder)
    store = there / "store"
    store.mkdir(parents=True)
    shutil.copy(ECHO_AGENT, there)
    account = there.parent.stat()
    for path in (there, store):
        os.chown(path, account.st_uid, account.st_gid)
        path.chmod(0o755)
    (there / ECHO_AGENT.name).chmod(0o644)
    forks = [word for kind in FORKS for word in ("--fork", kind)]
    on_host = ["python3", "-I", str(there / ECHO_AGENT.name), str(store)]
    mark = {"BENCH_AGENT": "1"}
    site.add_agent("here", "acp", site.echo_command(*forks), mark)
    site.add_agent("there", "acp", [*on_host, *forks], mark, where="host")
    site.add_agent("lean-here", "acp", site.echo_command(), mark)
    site.add_agent("lean-there", "acp", on_host, mark, where="host")
    return store


def _survive(report: Report, site: AgentSite, turns: int) -> None:
    """Turns of a few chats on one node; its agents are evicted again and again."""
    name = "survivor"
    node = site.node(name, POOL_IDLE_TIMEOUT="0.5")
    node.until(lambda: pong(site.app, name), "answers a ping")
    process = psutil.Process(node.pid)
    first = max(turns // 10, CHATS)  # all chats have an agent by then
    looks = {first, turns // 2, turns}
    resumed = wrong = 0
    seen: list[tuple[int, int, float, int]] = []
    for turn in range(1, turns + 1):
        chat = turn % CHATS
        got = site.turn(f"long-{chat}", "lean-there" if chat < CHATS // 5 else "lean-here", f"say {turn}")
        before = f"say {turn - CHATS}" if turn > CHATS else ""
        wrong += got["text"] != f"turn {(turn - 1) // CHATS + 1}: say {turn}; before: {before}"
        resumed += got["resumed"]
        if turn in looks:
            seen.append((turn, process.num_fds(), process.memory_info().rss / 1e6, process.num_threads()))
        if turn % EVERY == 0:
            _evict_all(site)
    report.raw["turn, fds, MB, threads"] = seen
    for turn, fds, megabytes, threads in seen:
        limit = None if turn == first else float(seen[0][1])
        report.add(f"node after turn {turn}: open files", fds, "fds", limit, remark=f"{threads} threads")
        report.add("... resident memory", megabytes, "MB")
    report.add("... more at the end than at the first look", 100 * (seen[-1][2] / seen[0][2] - 1), "%")
    report.add("turns with a wrong answer", wrong, "turns", 0.0, remark=f"of {turns}; {resumed} after an eviction")


def _evict_all(site: AgentSite) -> None:
    """Sweep until nobody is left."""
    time.sleep(0.5)
    deadline = time.monotonic() + 30
    while site.app.tasks["pool.sweep_shard"].delay(0).get(timeout=30)["evicted"]:
        if time.monotonic() > deadline:
            raise RuntimeError("the sweep always finds something")
        time.sleep(0.5)
