"""A process that holds connections of one kind: ``python -m benchmarks.memory_child NAME TARGET COUNT``.

It prints one JSON line when they are there, one more when commands wait (asked for by a line on stdin), and ends when
its stdin does.
"""

import asyncio
import gc
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import Missing, Peer, Target
from benchmarks.peers.libraries import Mitogen, ParallelSsh, Paramiko
from benchmarks.peers.on_asyncssh import Asyncssh
from benchmarks.peers.ours import Ours, OursOnChannels
from pool.runtime import loop_thread

KINDS: dict[str, type[Peer]] = {
    kind.name: kind for kind in (Ours, OursOnChannels, Asyncssh, Paramiko, Mitogen, ParallelSsh)
}
WAITING = 500
STEPS = 10  # how often memory is looked at
AT_ONCE = 4  # connects
SETTLED = 2.0  # seconds until the commands that can run do, and the others wait


def main() -> None:
    name, fields, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    paths = {key: Path(fields[key]) for key in ("client_key", "known_hosts", "home")}
    target = Target(**{**fields, **paths, "port": int(fields["port"])})
    try:
        first = KINDS[name](target)
        first.connect()
        first.run("true")
        peers, samples = _fill(KINDS[name], target, count)
    except Missing as why:
        print(json.dumps({"missing": str(why)}), flush=True)
        return
    except Exception as error:
        print(json.dumps({"missing": f"failed: {type(error).__name__}: {str(error)[:80]}"}), flush=True)
        os._exit(1)
    (few, low), (many, high) = samples[0], samples[-1]
    kb = (high - low) / (many - few) / 1e3
    told = {"kb": kb, "count": len(peers), "samples": samples, "of": f"{high / 1e6:.0f} MB in all"}
    print(json.dumps(told), flush=True)
    if sys.stdin.readline():
        waiting = _waiting_kb(first)
        print(json.dumps({"waiting_kb": waiting}), flush=True)
    sys.stdin.read()
    if not isinstance(first, Ours | Asyncssh):
        for peer in (*peers, first):
            peer.close()
    os._exit(0)  # the host notices, and a thousand farewells take long


def _fill(kind: type[Peer], target: Target, count: int) -> tuple[list[Peer], list[tuple[int, int]]]:
    """Connect, a few at once where that is safe; return the peers, and how many there were at which memory."""
    peers: list[Peer] = []
    samples: list[tuple[int, int]] = []
    step = max(1, count // STEPS)
    with ThreadPoolExecutor(AT_ONCE if issubclass(kind, Ours | Asyncssh) else 1) as threads:
        while len(peers) < count:
            peers += threads.map(lambda _: _connected(kind, target), range(min(step, count - len(peers))))
            gc.collect()
            samples.append((len(peers), _memory()))
    return peers, samples


def _connected(kind: type[Peer], target: Target) -> Peer:
    peer = kind(target)
    peer.connect()
    peer.run("true")
    return peer


def _memory() -> int:
    """Resident bytes of this process and of those below it."""
    me = psutil.Process()
    below: int = sum(process.memory_full_info().uss for process in me.children(recursive=True))
    return int(me.memory_info().rss) + below


def _waiting_kb(peer: Peer) -> float | None:
    """What each of many commands on one connection holds while they wait or run; None where that has no meaning."""
    if not isinstance(peer, Ours | Asyncssh):
        return None
    loop = loop_thread().loop
    peer.many("true", 50)  # what is made once is made
    gc.collect()
    before = _memory()
    call: Any = asyncio.run_coroutine_threadsafe(peer.amany("sleep 20", WAITING), loop)
    time.sleep(SETTLED)
    gc.collect()
    after = _memory()
    call.cancel()
    return (after - before) / WAITING / 1e3


if __name__ == "__main__":
    main()
