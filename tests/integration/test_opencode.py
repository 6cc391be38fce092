"""The shared opencode server: one for all chats, found dead or hung, restarted, reached elsewhere, refused."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest

from pool import SHARED, BackendPoolManager, BackendUnavailable, ConfigError, GroupLimit, TurnFailed
from pool.backends import opencode_server
from pool.chats import Chat
from pool.demo.llm import FakeLlm
from pool.hosts import Hosts, make_backend
from tests.support.processes import wait_gone
from tests.support.real_agents import opencode_home
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)


class Rig:
    """Pools over one home of opencode; each pool stands for a worker process."""

    def __init__(self, folder: Path) -> None:
        self.llm = FakeLlm().__enter__()
        self.folder = folder
        self.home = opencode_home(folder / "home", self.llm.url)
        self.command = self.home.serve_command[:2]
        self.pools: list[BackendPoolManager[Any]] = []
        self.sessions: dict[str, str] = {}

    def pool(self, **table: Any) -> BackendPoolManager[Any]:
        where = {} if "url" in table else {"command": self.command, "env": self.home.env}
        root = str(self.folder / "work" / "{key}")
        agents = {"oc": {"kind": "opencode", "root_dir": root, **where, **table}}
        self.hosts = Hosts.parse({"agents": agents}, "test")
        pool = BackendPoolManager(
            make_backend,
            config_for=self.hosts.config_for,
            group_for=self.hosts.agents.group_for,
            enable_periodic_cleanup=False,
            acquire_timeout=90,
        )
        self.pools.append(pool)
        return pool

    def turn(self, pool: BackendPoolManager[Any], chat: str, text: str, **options: Any) -> Any:
        """One turn, as `run_turn` has it; returns ``(session, turn)``."""
        with pool.backend(chat, "oc") as agent:
            session = agent.ensure_session(self.record(chat))
            self.sessions[chat] = session.session_id
            return session, agent.prompt(text, **options)

    def record(self, chat: str) -> Chat:
        return Chat(chat, "oc", session_id=self.sessions.get(chat, ""))

    def server(self, pool: BackendPoolManager[Any]) -> opencode_server.OpencodeServer:
        found = pool.peek(SHARED, "oc")
        assert isinstance(found, opencode_server.OpencodeServer)
        return found

    def processes(self, pool: BackendPoolManager[Any]) -> list[psutil.Process]:
        """The server's own process, without the shells around it."""
        group = self.server(pool)._process.local_pid
        return [p for p in psutil.Process(group).children(recursive=True) if p.name().startswith("opencode")]

    def close(self) -> None:
        for pool in self.pools:
            pool.destroy_all(grace=0)
        self.llm.__exit__(None, None, None)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("opencode"))
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def pool(rig: Rig) -> BackendPoolManager[Any]:
    """A worker process, with permission for commands."""
    return rig.pool(permissions={"execute": "allow"}, hang_timeout=1)


def test_chats_share_one_server_and_no_memory(rig, pool):
    """Two chats, one process; each remembers its own."""
    rig.turn(pool, "one", "I am one")
    rig.turn(pool, "two", "I am two")
    session, turn = rig.turn(pool, "one", "who am I?")
    assert turn.text == "turn 2: who am I?; earlier: [I am one]"
    assert (session.resumed, session.memory_lost) == (False, False)
    assert rig.server(pool).version.startswith("opencode 1.")
    assert len(rig.processes(pool)) == 1


def test_a_chat_that_was_evicted_goes_on(rig, pool):
    """Its session stays with the server."""
    rig.turn(pool, "gone", "first")
    pool.close_key("gone")
    session, turn = rig.turn(pool, "gone", "second")
    assert (session.resumed, turn.text) == (True, "turn 2: second; earlier: [first]")


def test_updates_come_while_it_works(rig, pool):
    """Text, tool and permission, in the calling thread."""
    updates: list[Any] = []
    _, turn = rig.turn(pool, "tool", "!tool echo out", on_update=lambda u: updates.append((threading.get_ident(), u)))
    assert turn.text.strip() == "tool said: out"
    assert turn.permissions == [{"title": "echo out", "kind": "execute", "answer": "allow"}]
    assert turn.tool_calls[0]["status"] == "completed"
    kinds = [update["type"] for _, update in updates]
    assert kinds.index("permission") < kinds.index("text")
    assert {thread for thread, _ in updates} == {threading.get_ident()}


def test_a_cancelled_turn_is_aborted_at_the_llm(rig, pool):
    """A client that merely went away would leave it running."""
    with pool.backend("stop", "oc") as agent:
        rig.sessions["stop"] = agent.ensure_session(rig.record("stop")).session_id

        def cancel_when_asked() -> None:
            wait_until(lambda: any("!hang" in r.users for r in rig.llm.requests), "the LLM was asked", 60)
            agent.cancel()

        thread = threading.Thread(target=cancel_when_asked)
        thread.start()
        turn = agent.prompt("!hang")
        thread.join()
    assert turn.stop_reason == "cancelled"
    asked = [r for r in rig.llm.requests if "!hang" in r.users]
    wait_until(lambda: asked[-1].state == "aborted", "the LLM's request is aborted")
    assert rig.turn(pool, "stop", "on")[1].text.startswith("turn 2: on")


def test_an_error_of_the_llm_fails_the_turn_and_no_more(rig, pool):
    """The chat goes on."""
    with pytest.raises(TurnFailed, match="told to fail"):
        rig.turn(pool, "bad", "!error 400")
    assert rig.turn(pool, "bad", "again")[1].stop_reason == "end_turn"


def test_a_session_that_is_gone_begins_anew_and_says_so(rig, pool):
    """Its id is known to nobody."""
    rig.sessions["lost"] = "ses_000000000000000000000000"
    session, turn = rig.turn(pool, "lost", "hello")
    assert (session.memory_lost, turn.text) == (True, "turn 1: hello; earlier: []")


def test_closing_a_chat_deletes_its_session_and_not_the_server(rig, pool):
    """Also when the chat has no backend any more; what is gone already is no error."""
    rig.turn(pool, "close", "hello")
    session_id = rig.sessions["close"]
    (before,) = rig.processes(pool)
    pool.close_key("close")
    for expected in ("deleted", f"opencode: HTTP 404: Session not found: {session_id}"):
        agent = rig.hosts.agents.make("close", "oc")
        agent.pool = pool
        assert agent.forget(rig.record("close")) == {"session": expected}
    assert rig.processes(pool) == [before]
    assert rig.turn(pool, "close", "hello?")[0].memory_lost


def test_a_server_that_dies_fails_the_turn_and_the_next_one_remembers(rig, pool):
    """kill -9 in the middle of a turn."""
    rig.turn(pool, "crash", "before")
    (process,) = rig.processes(pool)

    def kill_when_asked() -> None:
        wait_until(lambda: any("!slow 60 words" in r.users for r in rig.llm.requests), "the LLM was asked", 60)
        process.kill()

    thread = threading.Thread(target=kill_when_asked)
    thread.start()
    with pytest.raises(TurnFailed, match="died") as caught:
        rig.turn(pool, "crash", "!slow 60 words")
    thread.join()
    assert caught.value.reason == "died"
    session, turn = rig.turn(pool, "crash", "after")
    assert (session.memory_lost, session.resumed) == (False, True)
    assert "before" in turn.text


def test_a_server_that_hangs_is_ended_and_the_next_turn_starts_another(rig, pool):
    """It answers no probe for longer than hang_timeout; nobody had a turn there."""
    rig.turn(pool, "hung", "before")
    (process,) = rig.processes(pool)
    process.send_signal(signal.SIGSTOP)
    server = rig.server(pool)

    def swept() -> bool:
        server._ticked_at = 0.0  # sweeps come more often than it looks
        pool.sweep()
        return not server.usable

    wait_until(swept, "the server is given up", 60)
    wait_gone(process.pid)
    assert rig.turn(pool, "hung", "after")[1].text == "turn 2: after; earlier: [before]"


def test_a_server_that_is_gone_keeps_no_place(rig):
    """Chats that are warm let go of it: another can start although there is room for one only."""
    pool = rig.pool()
    pool.configure(groups={"agents": GroupLimit(1)})
    for chat in ("a1", "a2", "a3"):
        rig.turn(pool, chat, "hello")
    (process,) = rig.processes(pool)
    process.kill()
    wait_until(lambda: not rig.server(pool).usable, "its end is noticed")
    assert rig.turn(pool, "a2", "again")[1].text == "turn 2: again; earlier: [hello]"
    assert pool.get_stats().groups["agents"]["total"] == 1
    pool.destroy_all(grace=0)


def test_a_server_that_makes_progress_is_not_ended(rig, pool, monkeypatch):
    """Its probes fail, but words of a turn keep coming."""
    rig.turn(pool, "busy", "before")
    server = rig.server(pool)

    async def failing() -> None:
        raise BackendUnavailable("no answer")

    monkeypatch.setattr(server, "_probe", failing)
    server._well_at = monotonic() - 1000
    probed: list[bool] = []

    def look(_: Any) -> None:
        server._ticked_at = 0.0
        pool.sweep()
        probed.append(server.usable)

    rig.turn(pool, "busy", "!slow 2 a b c d e f g", on_update=look)
    assert len(probed) >= 7 and all(probed)


def test_a_server_elsewhere_is_used_with_its_password(rig, pool, tmp_path):
    """By url; a wrong password, or none, is told at once, and nothing is started or ended there."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    env = {**os.environ, **rig.home.env, "OPENCODE_SERVER_PASSWORD": "right"}
    secret = tmp_path / "secret"
    with psutil.Popen([*rig.home.serve_command, "--port", str(port)], env=env, cwd=tmp_path) as process:
        try:
            wait_until(lambda: _listens(port), "it listens", 60)
            secret.write_text("wrong\n")
            for table in ({"password": {"file": str(secret)}}, {}):
                with pytest.raises(BackendUnavailable, match="wrong password, or none") as caught:
                    rig.turn(rig.pool(url=url, **table), "there", "hello")
                assert (caught.value.reason, caught.value.retry_after) == ("login", None)
            secret.write_text("right\n")
            there = rig.pool(url=url, password={"file": str(secret)})
            assert rig.turn(there, "there", "hello")[1].text.startswith("turn 1: hello")
            there.destroy_all(grace=0)
            assert process.is_running()
        finally:
            process.terminate()


def test_a_server_that_is_not_there_is_asked_for_again(rig):
    """A refused connection is no reason to give up for good."""
    with pytest.raises(BackendUnavailable) as caught:
        rig.turn(rig.pool(url=f"http://127.0.0.1:{_free_port()}"), "nobody", "hello")
    assert caught.value.reason == "refused" and caught.value.retry_after is not None


def test_a_port_that_somebody_took_costs_another_attempt(rig, monkeypatch):
    """Between the look for a free one and the server's start."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], _free_port()])
        monkeypatch.setattr(opencode_server, "_free_port", lambda: next(ports))
        pool = rig.pool()
        with pool.backend(SHARED, "oc") as server:
            assert server.usable
        assert next(ports, None) is None
        pool.destroy_all(grace=0)


def test_a_server_that_cannot_start_says_why(rig, tmp_path):
    """A missing program, and one that ends at once."""
    for command, text in [
        (["no-such-opencode"], "not found"),
        (["sh", "-c", "echo it is broken >&2; exit 7"], "it is broken"),
    ]:
        rig.command, kept = command, rig.command
        try:
            pool = rig.pool()
        finally:
            rig.command = kept
        with pytest.raises(BackendUnavailable, match=text) as caught:
            rig.turn(pool, "never", "hello")
        assert caught.value.retry_after is None


def test_url_and_command_are_one_or_the_other():
    """A table with both, or none, is refused when it is read."""
    for table in ({}, {"url": "http://x", "command": ["opencode"]}):
        with pytest.raises(ConfigError, match="either command or url"):
            Hosts.parse({"agents": {"oc": {"kind": "opencode", "root_dir": "/w/{key}", **table}}}, "t")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
