"""`BackendPoolManager` with groups, and what a backend learns from its pool before it connects."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pool import BackendPoolManager, GroupLimit, PoolConfig
from pool.backends.base import Backend
from pool.errors import BackendUnavailable, PoolExhausted
from tests.support.fakes import CountingFarm, FakeBackend
from tests.support.waiting import wait_until

Pools = Callable[..., BackendPoolManager[Any]]


@pytest.fixture
def farm() -> CountingFarm:
    return CountingFarm()


@pytest.fixture
def pools(farm: CountingFarm) -> Iterator[Pools]:
    """Pools in which the backends of agent "heavy" are a group; closed, sound and without a leak after the test."""
    made: list[BackendPoolManager[Any]] = []

    def make(limit: GroupLimit, factory: Any = None, **settings: Any) -> BackendPoolManager[Any]:
        pool = BackendPoolManager(
            factory or farm,
            enable_periodic_cleanup=False,
            acquire_timeout=settings.pop("acquire_timeout", 30.0),
            config_for=lambda _, agent: {"kind": agent},
            group_for=lambda _, agent: "heavy" if agent == "heavy" else None,
            settings=PoolConfig(groups={"heavy": limit}, **settings),
        )
        made.append(pool)
        return pool

    yield make
    for gate in (farm.connects, farm.checks, farm.closes):
        gate.open()
    for pool in made:
        with pool._lock:
            pool._life.check_invariants()
        pool.dispose()
        assert pool.get_stats().total_backends == 0
        assert pool._life.groups == {}
    assert farm.leaked == []


def crowd(number: int, work: Callable[[int], Any]) -> list[Any]:
    """Do it in as many threads at the same time."""
    start = threading.Barrier(number)

    def run(n: int) -> Any:
        start.wait(30)
        return work(n)

    with ThreadPoolExecutor(number) as threads:
        return [future.result(60) for future in [threads.submit(run, n) for n in range(number)]]


def busy_world(pool: BackendPoolManager[Any], kinds: list[str]) -> Callable[[int], int]:
    """What one of many threads does: 20 borrows, of 50 keys."""

    def work(number: int) -> int:
        dice = random.Random(number)
        for _ in range(20):
            with pool.backend(f"user-{dice.randrange(50)}", agent=dice.choice(kinds)) as backend:
                assert backend.work() == "worked"
                threading.Event().wait(dice.random() / 500)
                assert backend.work() == "worked", "evicted under its user"
        return 20

    return work


def test_a_group_holds_under_many_threads_and_all_are_served(farm, pools):
    """30 threads, 50 keys, room for 10: never more than 10 alive, those that close included."""
    pool = pools(GroupLimit(10))
    assert sum(crowd(30, busy_world(pool, ["heavy"]))) == 600
    assert farm.books["heavy"].most_alive <= 10
    assert pool.get_stats().groups["heavy"]["total"] <= 10
    assert pool.get_stats().waiting == 0


def test_a_group_holds_in_a_pool_that_is_full_as_well(farm, pools):
    """Members make room for strangers and strangers for members: both caps hold all the time."""
    pool = pools(GroupLimit(3, starting=2), max_backends=6)
    assert sum(crowd(30, busy_world(pool, ["heavy", "light"]))) == 600
    assert farm.books["heavy"].most_alive <= 3
    assert farm.books["heavy"].most_opening <= 2
    assert farm.most_open <= 6


def test_starts_hold_under_many_threads(farm, pools):
    """Never more than 2 of the group in `open` at once, and all are served."""
    pool = pools(GroupLimit(20, starting=2))
    assert sum(crowd(30, busy_world(pool, ["heavy"]))) == 600
    assert farm.books["heavy"].most_opening == 2


def test_starts_hold_when_a_whole_group_fails_its_check(farm, pools):
    """What replaces a dead backend is a start like any other."""
    pool = pools(GroupLimit(20, starting=2), check_after=0.0)
    for n in range(10):
        with pool.backend(f"user-{n}", agent="heavy"):
            pass
    farm.check_error = OSError("gone")

    def work(number: int) -> None:
        with pool.backend(f"user-{number}", agent="heavy") as backend:
            assert backend.work() == "worked"

    crowd(10, work)
    assert farm.connect_calls == 20
    assert farm.books["heavy"].most_opening <= 2


def test_ungrouped_backends_do_not_wait_for_a_groups_starts(farm, pools):
    """They pass those that wait, at once."""
    pool = pools(GroupLimit(20, starting=2))
    farm.connects.shut()
    threads = [threading.Thread(target=lambda n=n: pool.acquire_backend(f"k{n}", "heavy").release()) for n in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: pool.get_stats().waiting == 6, "six wait")
    assert pool.get_stats().groups["heavy"]["starting"] == 2
    light = threading.Thread(target=lambda: pool.acquire_backend("k", "light").release())
    light.start()
    wait_until(lambda: farm.books["light"].opening == 1, "the light one is in its open")
    wait_until(lambda: farm.books["heavy"].opening == 2, "two heavy ones are in theirs")
    farm.connects.open()
    for thread in (*threads, light):
        thread.join(30)
    assert farm.books["heavy"].most_opening == 2


def test_a_victim_of_another_group_is_gone_before_its_place_in_the_group_is_had(farm, pools):
    """And not only when the connect that displaced it is done."""
    pool = pools(GroupLimit(1), max_backends=2)
    pool.acquire_backend("a", "heavy").release()
    held = pool.acquire_backend("b", "light")
    farm.closes.shut()
    farm.connects.shut()
    threads = [threading.Thread(target=lambda: pool.acquire_backend("c", "light").release())]
    threads[0].start()
    wait_until(lambda: farm.made[0].close_calls == 1, "the heavy one is being closed")
    threads.append(threading.Thread(target=lambda: pool.acquire_backend("d", "heavy").release()))
    threads[1].start()
    wait_until(lambda: pool.get_stats().waiting == 2, "both wait")
    pool.configure(max_backends=3)
    assert pool.get_stats().groups["heavy"]["total"] == 1
    assert pool.get_stats().groups["heavy"]["starting"] == 0
    farm.closes.open()
    wait_until(lambda: farm.books["heavy"].opening == 1, "the next heavy one starts while the light one still connects")
    assert farm.books["light"].opening == 1
    farm.connects.open()
    for thread in threads:
        thread.join(30)
    held.release()
    assert farm.books["heavy"].most_alive == 1


def test_exhausted_names_the_group(pools):
    """Which limit it was, and how full the group is."""
    pool = pools(GroupLimit(1))
    with pool.backend("a", agent="heavy"):
        pool.configure(acquire_timeout=0.05)
        with pytest.raises(PoolExhausted, match=r"group 'heavy' is at count=1 \(total 1, busy 1"):
            pool.acquire_backend("b", "heavy")


def test_stats_tell_of_each_group(pools):
    """Also of one that has no backend yet."""
    pool = pools(GroupLimit(5))
    empty = {"total": 0, "busy": 0, "idle": 0, "starting": 0, "weight": 0}
    assert pool.get_stats().groups == {"heavy": empty}
    pool.acquire_backend("a", "heavy").release()
    with pool.backend("b", agent="heavy") as backend, pool.backend("c"):
        backend.weight = 7
        assert pool.get_stats().groups == {"heavy": {"total": 2, "busy": 1, "idle": 1, "starting": 0, "weight": 7}}


def test_a_registered_backend_belongs_to_its_group(farm, pools):
    """By the same function as an acquired one."""
    pool = pools(GroupLimit(5))
    backend = farm(kind="heavy")
    backend.run_sync(backend.connect())
    pool.register("a", "heavy", backend)
    assert pool.get_stats().groups["heavy"]["total"] == 1


def test_a_sweep_weighs_what_the_backends_have_just_measured(pools):
    """Each looks after itself first; then the longest idle ones of a group that is too heavy leave."""

    class Growing(FakeBackend):
        async def tick_health(self, now: float) -> None:
            self.weight = 60

    farm = CountingFarm()
    pool = pools(GroupLimit(5, weight=100), factory=lambda **config: Growing(farm, config))
    pool.acquire_backend("a", "heavy").release()
    pool.acquire_backend("b", "heavy").release()
    assert pool.sweep() == [("a", "heavy")]
    assert pool.get_stats().groups["heavy"]["weight"] == 60


# -- what a backend learns and says


def test_a_backend_may_take_longer_than_the_pools_connect_timeout(farm, pools):
    """Its own number counts, and stands in the error."""

    class Slow(FakeBackend):
        open_timeout = 60.0

        async def open(self) -> None:
            await asyncio.sleep(0.1)
            await super().open()

    pool = pools(GroupLimit(1), factory=lambda **config: Slow(farm, config), connect_timeout=0.05)
    with pool.backend("a") as backend:
        assert backend.work() == "worked"
    Slow.open_timeout = 0.15
    farm.connects.shut()
    with pytest.raises(BackendUnavailable, match=r"no connection within 0\.15 s"):
        pool.acquire_backend("b")


def test_a_backend_without_an_open_timeout_gets_the_pools(farm, pools):
    """None means just that."""
    pool = pools(GroupLimit(1), connect_timeout=0.05)
    farm.connects.shut()
    with pytest.raises(BackendUnavailable, match=r"no connection within 0\.05 s"):
        pool.acquire_backend("a")


def test_a_backend_borrows_the_one_it_is_built_on_from_its_pool(farm, pools):
    """In `open`, of its own key; it gives it back in `close`, so that both are gone in the end."""

    class Agent(FakeBackend):
        async def open(self) -> None:
            assert self.pool is not None
            self.host = await self.pool.aacquire_backend("a", "host")
            await super().open()

        async def close(self) -> None:
            await super().close()
            self.host.release()

    def make(kind: str) -> Backend:
        return farm(kind=kind) if kind == "host" else Agent(farm, {})

    pool = pools(GroupLimit(1), factory=make)
    with pool.backend("a", agent="agent") as agent:
        assert agent.pool is pool
        assert agent.host.backend is pool.peek("a", "host")
    assert pool.get_stats().active_backends == 1
    assert pool.close_key("a") == {"closed": ["agent"], "retired": ["host"]}
    wait_until(lambda: pool.get_stats().total_backends == 0, "both are gone")


def test_a_backend_of_no_pool_has_none(farm):
    """It must do without, or say so."""
    assert farm(kind="x").pool is None
    assert farm(kind="x").open_timeout is None
    assert farm(kind="x").weight == 0
