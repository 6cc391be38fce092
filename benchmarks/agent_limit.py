"""Many more chats than places for agents: every turn succeeds, the limit holds, and no agent is ended in a turn."""

import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.agent_site import TURN_TIMEOUT, AgentSite, agent_site
from benchmarks.harness import Report, p50, pong, spread

CHATS, LIMIT, ROUNDS = 50, 10, 10
LONGEST = 0.4  # seconds of a turn


def measure(*, quick: bool) -> Report:
    rounds = 2 if quick else ROUNDS
    report = Report("agent_limit", f"{CHATS} chats on a node with POOL_MAX_AGENTS={LIMIT}, {rounds} turns each")
    with agent_site() as site:
        site.add_agent("echo", "acp", site.echo_command(), {})
        node = site.node("node0", POOL_MAX_AGENTS=str(LIMIT))
        node.until(lambda: pong(site.app, "node0"), "answers a ping")
        with _watching(site) as watch:
            started = time.monotonic()
            errors, wrong, times = _all_turns(site, rounds)
            took = time.monotonic() - started
        log = (site.folder / "node0.log").read_text(errors="replace")
        ledger = Counter(line.split(" ", 1)[0] for line in (site.store / "ledger").read_text().splitlines())
        agents = len((site.store / "pids").read_text().splitlines())
    turns = CHATS * rounds
    report.raw |= {"alive at a look": dict(watch.seen), "errors": errors, "round, s": times, "log": log[-4000:]}
    report.add("turns that failed", len(errors), "turns", 0.0, remark=f"of {turns}")
    report.add("... that had forgotten their chat, or mixed it up", wrong, "turns", 0.0)
    looks = sum(watch.seen.values())
    told = f"{looks:,} looks, {1e3 * took / looks:.1f} ms apart"
    report.add("agents alive at once, the most", max(watch.seen), "agents", float(LIMIT), remark=told)
    report.add("agents ended in a turn, by what they wrote down", ledger["begin"] - ledger["end"], "agents", 0.0)
    report.add("BackendClosed in the node's log", log.count("BackendClosed"), "lines", 0.0)
    report.add("agents started in all", agents, "agents", remark=f"{agents / turns:.2f} for each turn")
    report.add("turns per second", turns / took, "turns/s")
    report.add("a round: a turn of each chat, sent at once", p50(times), "s", remark=spread(times))
    return report


def _all_turns(site: AgentSite, rounds: int) -> tuple[list[str], int, list[float]]:
    """Have a turn of each chat at once, and again; return errors, the number of wrong texts, seconds of each round."""
    chance = random.Random(3)
    errors: list[str] = []
    times: list[float] = []
    wrong = 0
    said = [""] * CHATS
    for number in range(rounds):
        results = []
        sent = time.monotonic()
        for chat in range(CHATS):
            prompt = f"/slow {chance.uniform(0, LONGEST):.2f} round {number} of {chat}"
            results.append((chat, prompt, site.send(f"chat-{chat}", "echo", prompt)))
        for chat, prompt, result in results:
            try:
                got = result.get(timeout=TURN_TIMEOUT)
            except Exception as error:
                errors.append(repr(error))
                continue
            wrong += got["text"] != f"turn {number + 1}: {prompt}; before: {said[chat]}"
            said[chat] = prompt
        times.append(time.monotonic() - sent)
    return errors, wrong, times


class _Watch:
    """Counts the running agents of a site from outside, as often as it can."""

    def __init__(self, site: AgentSite) -> None:
        self.seen: Counter[int] = Counter()
        self._command = "\0".join(site.echo_command()).encode()
        self._before = set(os.listdir("/proc"))  # none of them is an agent
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._ended.wait(0.001):
            self.seen[sum(1 for _ in self._agents())] += 1

    def _agents(self) -> Iterator[str]:
        for pid in os.listdir("/proc"):
            if pid not in self._before:
                try:
                    text = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if text.startswith(self._command):
                    yield pid


@contextmanager
def _watching(site: AgentSite) -> Iterator[_Watch]:
    watch = _Watch(site)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    watch._thread.start()
    try:
        yield watch
    finally:
        watch._ended.set()
        watch._thread.join()
        sys.setswitchinterval(interval)
