"""Many cold users of one host at the same moment: who gets in, and when; and where the time of one login goes."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import count
from time import perf_counter, process_time
from typing import Any
from unittest.mock import patch

import asyncssh

from benchmarks.harness import Report, interleaved, p50, ratio, remote_folder, scratch, spread, ssh_server
from pool import BackendPoolManager, RemoteFilesystemBackend
from pool.backends import ssh
from pool.runtime import loop_thread

DEFAULT = "10:30:100"
"""OpenSSH's own MaxStartups: from 10 logins under way on, some are turned away; from 100 on, all."""

LIMIT = 8
"""Our default ``max_connects``."""

_runs = count()


def measure(*, quick: bool) -> Report:
    users, rounds, logins = (40, 1, 3) if quick else (200, 3, 25)
    report = Report("stampede", f"{users} users log in to one host at once; a cold login alone")
    with scratch() as folder:
        for max_startups in (DEFAULT, "1000"):
            with ssh_server(folder / max_startups.partition(":")[0], max_startups=max_startups) as (which, info):
                _crowds(report, _login(info, folder), users, rounds, f"MaxStartups {max_startups}")
        with ssh_server(folder / "one", max_startups=DEFAULT) as (which, info):
            _one(report, _login(info, folder), logins)
    report.notes.append(f"{which}. A user is in when its first command (asyncssh: conn.run, ours: exec) has ended.")
    return report


def _login(info: Any, folder: Any) -> dict[str, Any]:
    return {
        "host": "127.0.0.1",
        "port": info.port,
        "username": info.username,
        "client_keys": str(info.client_key),
        "known_hosts": str(info.known_hosts),
        "root_dir": remote_folder(folder),
    }


# -- many at once


def _crowds(report: Report, login: Mapping[str, Any], users: int, rounds: int, where: str) -> None:
    """Ours, and asyncssh, each with and without a limit, by turns, on one server."""
    takers: dict[str, Callable[[], dict[str, Any]]] = {
        "ours": partial(_ours, login, users),
        "ours, max_connects 1000": partial(_ours, {**login, "max_connects": 1000}, users),
        "asyncssh": partial(_asyncssh, login, users, users),
        f"asyncssh, Semaphore({LIMIT})": partial(_asyncssh, login, users, LIMIT),
    }
    crowds: dict[str, list[dict[str, Any]]] = {name: [] for name in takers}
    contestants = {name: partial(_crowd, takers[name], crowds[name]) for name in takers}
    told = interleaved(contestants, rounds)
    report.raw[where] = crowds
    rates: dict[str, list[float]] = {}
    for name, seconds in told.items():
        got_in = [crowd["got in, s"] for crowd in crowds[name]]
        rates[name] = [len(times) / max(taken, 1e-9) for times, taken in zip(got_in, seconds, strict=True)]
        least = min(map(len, got_in))
        if name == "ours":
            report.add(f"{where}: ours: users that got in, worst round", least, "users", users, least=True)
        half = p50([p50(times) for times in got_in if times] or [0.0])
        remark = f"{least} of {users} got in, half of them after {half:.3g} s; {spread(seconds)}"
        report.add(f"{where}: {name}: until the last", p50(seconds), "s", remark=remark)
    for name in list(takers)[1:]:
        report.add(f"{where}: ours / {name}, users let in a second", ratio(rates["ours"], rates[name]), "x")


def _crowd(take: Callable[[], dict[str, Any]], crowds: list[dict[str, Any]]) -> float:
    """One stampede; the seconds until the last one that got in."""
    crowds.append(take())
    return max(crowds[-1]["got in, s"], default=0.0)


async def _all_at_once(use: Callable[[int], Awaitable[None]], users: int) -> dict[str, Any]:
    """When each one got in, and what the others were told."""
    started = perf_counter()
    got_in: list[float] = []
    errors: list[str] = []

    async def one(number: int) -> None:
        try:
            await use(number)
        except Exception as error:  # the point of the table: who is told what
            errors.append(f"{type(error).__name__}: {error}")
        else:
            got_in.append(perf_counter() - started)

    await asyncio.gather(*(one(number) for number in range(users)))
    return {"got in, s": got_in, "errors": errors}


def _ours(login: Mapping[str, Any], users: int) -> dict[str, Any]:
    pool = BackendPoolManager(RemoteFilesystemBackend, login, max_backends=users, acquire_timeout=120.0)
    run = next(_runs)

    async def use(number: int) -> None:
        async with pool.abackend(f"user-{run}-{number}") as backend:
            await backend.aexec("true")

    try:
        return loop_thread().run(_all_at_once(use, users))
    finally:
        pool.destroy_all(0.0)


def _asyncssh(login: Mapping[str, Any], users: int, limit: int) -> dict[str, Any]:
    connections: list[asyncssh.SSHClientConnection] = []
    options = _plain(login)
    places = asyncio.Semaphore(limit)

    async def use(_: int) -> None:
        async with places:
            connection = await asyncssh.connect(**options)
        connections.append(connection)
        await connection.run("true", check=True)

    async def crowd() -> dict[str, Any]:
        try:
            return await _all_at_once(use, users)
        finally:
            for connection in connections:
                connection.close()
            await asyncio.gather(*(connection.wait_closed() for connection in connections))

    return loop_thread().run(crowd())


def _plain(login: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: login[name] for name in ("host", "port", "username", "known_hosts")}
    return {**options, "client_keys": [login["client_keys"]], "config": None, "agent_path": None}


# -- one alone


def _one(report: Report, login: Mapping[str, Any], rounds: int) -> None:
    """One cold login: ours, ours without what shortens it, and asyncssh's with one command."""
    cpu: dict[str, list[float]] = {}

    def timed(name: str, login_once: Callable[[], Awaitable[Callable[[], Awaitable[None]]]]) -> Callable[[], float]:
        async def once() -> float:
            started, worked = perf_counter(), process_time()
            close = await login_once()
            taken = 1e3 * (perf_counter() - started)
            cpu.setdefault(name, []).append(1e3 * (process_time() - worked))
            await close()
            return taken

        return lambda: loop_thread().run(once())

    ours = partial(_open, login)
    ways = {"ours": ours, "ours, as asyncssh logs in": partial(_as_asyncssh, ours), "asyncssh": partial(_bare, login)}
    contestants = {name: timed(name, way) for name, way in ways.items()}
    interleaved(contestants, 1)
    cpu.clear()
    told = interleaved(contestants, rounds)
    report.raw["one login, ms"], report.raw["one login, CPU ms of the client"] = told, cpu
    for name, values in told.items():
        report.add(f"one login: {name}", p50(values), "ms", remark=f"{spread(values)}; CPU {p50(cpu[name]):.1f} ms")
    report.add("one login: ours / as asyncssh logs in", ratio(told["ours"], told["ours, as asyncssh logs in"]), "x")


async def _open(login: Mapping[str, Any]) -> Callable[[], Awaitable[None]]:
    backend = RemoteFilesystemBackend(**login)
    await backend.connect()
    return backend.adestroy


async def _as_asyncssh(
    ours: Callable[[], Awaitable[Callable[[], Awaitable[None]]]],
) -> Callable[[], Awaitable[None]]:
    """Our login without prompt acknowledgements, without AES-GCM first, known hosts read each time."""

    async def log_in(host: str, port: int, client: Any, _: float, options: dict[str, Any]) -> Any:
        return await asyncssh.connect(host, port, client_factory=client, **options)

    with patch.object(ssh, "log_in", log_in), patch.object(ssh, "prompt_acks", nullcontext):
        return await ours()


async def _bare(login: Mapping[str, Any]) -> Callable[[], Awaitable[None]]:
    connection = await asyncssh.connect(**_plain(login))
    await connection.run("true", check=True)

    async def close() -> None:
        connection.close()
        await connection.wait_closed()

    return close
