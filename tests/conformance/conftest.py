"""The kinds of backends that every test here runs over, each test checked for leaks."""

import asyncio
import threading

import pytest

from pool.loopback_sshd import LoopbackSshd
from pool.runtime import loop_thread
from tests.support.leaks import no_leaks
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.rigs import Rig
from tests.support.services import require_service

OPENSSH = [pytest.param(kind, marks=pytest.mark.openssh) for kind in ("openssh", "openssh-channel")]
SSH = ["loopback", *OPENSSH]
SHELLS = ["local", *SSH]
CHANNELS = ["loopback-channel", OPENSSH[1]]
"""The kinds whose commands have a channel each."""


@pytest.fixture(scope="session")
def loopback_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loopback")
    with LoopbackSshd(folder / "sshd", home=folder / "home") as server:
        yield server


@pytest.fixture(scope="session")
def openssh_server(tmp_path_factory):
    require_service("sshd", sshd_binary())
    with OpenSshd(tmp_path_factory.mktemp("openssh") / "sshd") as server:
        yield server


def _rigs(request, tmp_path):
    kind = request.param
    server = kind.partition("-")[0]
    info = None if kind in {"memory", "local"} else request.getfixturevalue(f"{server}_server").info
    with no_leaks(), Rig(kind, tmp_path, info) as rig:
        yield rig


@pytest.fixture(params=["memory", *SHELLS])
def rig(request, tmp_path):
    """Every kind; the memory kind runs commands by a handler."""
    yield from _rigs(request, tmp_path)


@pytest.fixture(params=SHELLS)
def shell(request, tmp_path):
    """The kinds with real processes and a real file system."""
    yield from _rigs(request, tmp_path)


@pytest.fixture(params=SSH)
def remote(request, tmp_path):
    """The kinds with a connection that can be lost."""
    yield from _rigs(request, tmp_path)


@pytest.fixture
def backend(rig):
    return rig.backend()


@pytest.fixture
def sh(shell):
    """A backend that runs real commands."""
    return shell.backend()


def _in_foreign_loop(main):
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        return asyncio.run_coroutine_threadsafe(main, loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


@pytest.fixture(
    params=[asyncio.run, _in_foreign_loop, lambda main: loop_thread().run(main)],
    ids=["asyncio.run", "foreign-loop", "pool-loop"],
)
def run(request):
    """Run a coroutine to its end on one of the event loops that a caller may have."""
    return request.param
