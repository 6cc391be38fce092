"""What every kind of agent does: a session that lasts, one turn at a time, and nothing left at the end."""

import asyncio
import threading

import pytest

from pool.errors import BackendClosed, ConfigError, TurnTimeout
from tests.support.agent_rigs import CodexRig, EchoRig, HostRig, OpencodeRig
from tests.support.leaks import no_leaks
from tests.support.processes import wait_gone
from tests.support.waiting import wait_until

OPENSSH = pytest.param("host-openssh", marks=pytest.mark.openssh)
KINDS = ["echo", "host-loopback", OPENSSH, "codex", "opencode"]
SLOW = "!slow 60 one two three four"


@pytest.fixture(params=KINDS, scope="module")
def rig(request, tmp_path_factory):
    """One of each kind; nothing of it is left after the last test."""
    folder = tmp_path_factory.mktemp("agents")
    kind, _, host = request.param.partition("-")
    if host:
        rig = HostRig(request.getfixturevalue(f"{host}_server").info)
    else:
        rig = {"echo": EchoRig, "codex": CodexRig, "opencode": OpencodeRig}[kind](folder)
    with no_leaks(), rig:
        yield rig
        for backend in rig._backends:
            backend.destroy()
    wait_until(lambda: rig.processes() == [], "no process is left")  # on a host the guard ends them


@pytest.fixture(scope="module")
def shared(rig):
    """A box for the backend that tests share which leave it as they found it: a real agent takes its time to start."""
    return {}


@pytest.fixture
def agent(rig, shared):
    """An agent with a session, in which much may have been said."""
    backend = shared.get("backend")
    if backend is None or not backend.usable:
        backend = shared["backend"] = rig.ready()
    return backend


class Turning:
    """A turn in a thread of its own; use as a context, which waits for its end."""

    def __init__(self, backend, text, **options):
        self.updates = []
        self.result = self.error = None
        self._call = lambda: backend.prompt(text, on_update=self.updates.append, **options)
        self._backend = backend
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self._thread.start()
        wait_until(self._backend.is_busy, "the turn runs")
        return self

    def __exit__(self, *_):
        self._thread.join(60)
        assert not self._thread.is_alive()


def remembers(backend):
    """Whether the agent answers, in a session that has seen nothing but what it tells."""
    turn = backend.prompt("usable")
    return turn.stop_reason == "end_turn" and ": usable; earlier: [" in turn.text


def test_a_second_turn_remembers_the_first(rig, agent):
    """A session is made, and what was said in it is known in the next turn."""
    session = agent.ensure_session(rig.chat(agent_id(agent)))
    assert session.session_id
    assert session.version
    assert not session.memory_lost
    first = agent.prompt("alpha")
    assert (first.stop_reason, first.truncated) == ("end_turn", False)
    assert "alpha" in agent.prompt("beta").text.partition("earlier: ")[2]


def agent_id(backend):
    return backend._session_id


def test_a_warm_session_is_not_brought_back_again(rig, agent):
    """It is neither resumed nor lost, just there."""
    session = agent.ensure_session(rig.chat(agent_id(agent)))
    assert (session.resumed, session.memory_lost) == (False, False)


def test_another_process_resumes_the_session(rig):
    """After the first process is gone, a new one has the memory, and says that it brought it back."""
    first = rig.ready()
    session_id = agent_id(first)
    first.prompt("alpha")
    first.destroy()
    second = rig.backend()
    session = second.ensure_session(rig.chat(session_id))
    assert (session.session_id, session.resumed, session.memory_lost) == (session_id, True, False)
    assert second.prompt("beta").text == "turn 2: beta; earlier: [alpha]"
    second.destroy()


def test_an_unknown_session_begins_anew_and_says_so(rig, agent):
    """The chat goes on with a new session, and the loss is told."""
    session = agent.ensure_session(rig.chat("0199-no-such-session"))
    assert (session.resumed, session.memory_lost) == (False, True)
    assert session.session_id not in {"", "0199-no-such-session"}
    assert agent.prompt("gamma").text == "turn 1: gamma; earlier: []"


def test_updates_come_in_order_in_the_calling_thread(agent):
    """Put together, the text updates are the turn's text."""
    threads, texts = set(), []

    def on_update(update):
        threads.add(threading.get_ident())
        if update["type"] == "text":
            texts.append(update["text"])

    turn = agent.prompt("!slow 0.2 one two three four", on_update=on_update)
    assert "".join(texts) == turn.text
    assert turn.text.split() == ["one", "two", "three", "four"]
    assert threads == {threading.get_ident()}


def test_an_error_of_the_follower_cancels_the_turn(agent):
    """The exception comes back as it is, the agent has stopped, and it works on afterwards."""

    def on_update(update):
        if update["type"] == "text":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        agent.prompt("!slow 2 one two three four", on_update=on_update)
    assert agent.usable
    assert not agent.is_busy()
    assert remembers(agent)


def test_cancel_ends_a_slow_turn(agent):
    """`prompt` returns normally, with the stop reason, and the agent works on."""
    assert agent.cancel() is False
    with Turning(agent, SLOW) as turning:
        assert agent.cancel() is True
    assert turning.error is None
    assert turning.result.stop_reason == "cancelled"
    assert agent.usable
    assert remembers(agent)


def test_a_timeout_ends_a_slow_turn(agent):
    """It is an error with the text so far, and the next turn works."""
    with pytest.raises(TurnTimeout, match=r"cancelled after 0.5 s: !slow 60") as caught:
        agent.prompt(SLOW, timeout=0.5)
    assert caught.value.reason == "timeout"
    assert agent.usable
    assert remembers(agent)


def test_cancelling_the_task_that_awaits_ends_the_turn(agent):
    """From another event loop as well; the agent works on."""

    async def main():
        task = asyncio.create_task(agent.aprompt(SLOW))
        await asyncio.to_thread(wait_until, agent.is_busy, "the turn runs")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not agent.is_busy()
    assert agent.usable
    assert remembers(agent)


def test_what_needs_leave_is_denied_by_default(rig, agent):
    """The tool does not run, and the result says what was asked for and refused."""
    turn = agent.prompt("!tool touch forbidden; echo done")
    assert [(asked["kind"], asked["answer"]) for asked in turn.permissions] == [("execute", "deny")]
    assert "touch forbidden" in turn.permissions[0]["title"]
    assert not (rig.root / "forbidden").exists()
    assert remembers(agent)


def test_a_policy_allows_a_tool(rig):
    """Then it runs, and the result names it."""
    agent = rig.ready(permissions={"execute": "allow"})
    turn = agent.prompt("!tool touch allowed; echo done")
    assert turn.text == "tool said: done\n"
    assert (rig.root / "allowed").exists()
    assert [(asked["kind"], asked["answer"]) for asked in turn.permissions] == [("execute", "allow")]
    assert [(call["kind"], call["status"]) for call in turn.tool_calls] == [("execute", "completed")]
    agent.destroy()


@pytest.mark.parametrize(
    ("text", "options"),
    [("", {}), (" \n", {}), ("x" * (10 << 20), {}), (None, {}), ("x", {"timeout": 0})],
    ids=["empty", "blank", "10 MB", "no text", "no time"],
)
def test_what_is_no_prompt_is_refused_at_once(agent, text, options):
    """The agent does not see it."""
    with pytest.raises(ConfigError, match=r"prompt|timeout"):
        agent.prompt(text, **options)
    assert not agent.is_busy()
    assert agent.usable


def test_a_second_turn_at_a_time_is_refused(agent):
    """The first one goes on; meanwhile the backend says that it works."""
    assert not agent.is_busy()
    with Turning(agent, SLOW) as turning:
        assert agent.is_busy()
        with pytest.raises(ConfigError, match="one at a time"):
            agent.prompt("x")
        assert agent.cancel()
    assert turning.result.stop_reason == "cancelled"
    assert not agent.is_busy()


def test_destroy_under_a_turn_ends_everything(rig):
    """The turn raises BackendClosed, and so does everything after; no process is left."""
    others = set(rig.processes())
    agent = rig.ready()
    with Turning(agent, SLOW) as turning:
        own = set(rig.processes()) - others
        assert own
        agent.destroy()
    assert type(turning.error) is BackendClosed
    for call in (lambda: agent.prompt("x"), lambda: agent.ensure_session(rig.chat())):
        with pytest.raises(BackendClosed):
            call()
    wait_gone(*own)


def test_a_prompt_without_a_session_is_refused(rig):
    """Whoever forgets `ensure_session` is told."""
    agent = rig.backend()
    with pytest.raises(ConfigError, match="ensure_session"):
        agent.prompt("x")
    agent.destroy()
