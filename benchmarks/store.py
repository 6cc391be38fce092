"""What the lease table costs the Redis: calls of a quiet system, and the time of one."""

import asyncio
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import redis
from redis.asyncio import Redis

from benchmarks.fleet import Fleet
from benchmarks.harness import Report, broker, p50, scratch, spread
from pool.sharding.lease import Answer, Request, Terms
from pool.sharding.redis_store import RedisStore

NODES = ("node0", "node1", "node2")
MEMBERS = 10  # of the table whose beats are timed
SIZES = (64, 1024)
INSIDE = {"time", "info", "hget", "hset", "hexists", "hgetall", "hkeys", "zadd", "zrangebyscore", "zscore"}
"""What a beat's script calls, and INFO counts too."""


def measure(*, quick: bool) -> Report:
    seconds, rounds = (5.0, 50) if quick else (30.0, 500)
    report = Report("store", f"{len(NODES)} quiet nodes for {seconds:g} s; {rounds} beats of one of {MEMBERS} members")
    with scratch() as folder, broker(folder) as url, broker(folder / "coordination") as leases, ExitStack() as stack:
        site = Fleet(folder, url, stack, POOL_REDIS_URL=leases, POOL_RESULT_URL=url)
        site.start(*NODES)
        calls, taken = _calls(leases, seconds)
        report.raw["calls"] = calls
        each = sum(calls.values()) / len(NODES) / (taken / Terms().heartbeat)
        remark = ", ".join(f"{name} {count}" for name, count in calls.items())
        report.add("calls per node and heartbeat, of any command", round(each, 2), "", 1.0, remark=remark)
    for shards in SIZES:
        with scratch() as folder, broker(folder) as url:
            told = asyncio.run(_beats(url, shards, rounds))
        report.raw[f"ms, {shards} shards"] = told
        for what, values in told.items():
            report.add(f"{shards:,} shards: {what}", p50(values), "ms", remark=spread(values))
    report.notes.append(
        "The leases have a Redis of their own here, so that nothing else is counted. A beat's time is the client's:"
        " asyncio, loopback, one at a time."
    )
    return report


def _calls(url: str, seconds: float) -> tuple[dict[str, int], float]:
    """What a server was sent within some seconds, by command; and how many seconds it really were."""
    with redis.Redis.from_url(url) as client:
        before, started = _stats(client), time.monotonic()
        time.sleep(seconds)
        after, taken = _stats(client), time.monotonic() - started
    found = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in found.items() if count}, taken


def _stats(client: Any) -> dict[str, int]:
    """By command; neither our own nor those that a script calls, which INFO counts as if they had been sent."""
    stats = client.info("commandstats")
    names = {name.removeprefix("cmdstat_"): value["calls"] for name, value in stats.items()}
    return {name: count for name, count in names.items() if name not in INSIDE}


async def _beats(url: str, shards: int, beats: int) -> dict[str, list[float]]:
    """Milliseconds of a beat that changes nothing, and of one that reads the whole table back."""
    client: Any = Redis.from_url(url, decode_responses=True)
    terms = Terms(ttl=60.0)
    store = RedisStore(client, "pool", shards, terms)
    told: dict[str, list[float]] = {"a quiet beat": [], "a beat that reads the whole table back": []}
    try:
        nodes = [_request(f"node{number}", range(number, shards, MEMBERS)) for number in range(MEMBERS)]
        while (await store.beat(nodes[0]._replace(takes=()))).settles_in > 0:
            await asyncio.sleep(0.1)
        for number, request in enumerate(nodes):
            answer = await store.beat(request)
            nodes[number] = request._replace(takes=(), born=answer.born, seen=answer.version)
        for number in range(beats):
            node = number % MEMBERS
            taken, answer = await _timed(store, nodes[node])
            if number >= MEMBERS:  # each has seen the others' shares by then
                told["a quiet beat"].append(taken)
            nodes[node] = nodes[node]._replace(seen=answer.version)
        for _ in range(max(10, beats // 10)):
            taken, answer = await _timed(store, nodes[0]._replace(seen=0))
            assert answer.leases is not None
            assert len(answer.leases) == shards
            told["a beat that reads the whole table back"].append(taken)
    finally:
        await client.aclose()
    return told


def _request(node: str, takes: Iterable[int]) -> Request:
    return Request(
        incarnation=f"{node}/1",
        node=node,
        state="active",
        born="",
        seen=0,
        floor=0,
        takes=tuple(takes),
        releases=(),
        asserts=(),
        buried=(),
        elapsed=1.0,
        sent=0.0,
    )


async def _timed(store: RedisStore, request: Request) -> tuple[float, Answer]:
    started = time.perf_counter()
    answer = await store.beat(request)
    return 1e3 * (time.perf_counter() - started), answer
