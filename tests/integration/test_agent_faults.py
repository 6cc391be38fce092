"""Agents that misbehave: each fault ends as the right error, in a bounded time, and leaves nothing behind."""

import asyncio
import json
import os
import signal

import pytest

from pool.backends import output
from pool.errors import BackendUnavailable, PathEscapeError, TurnFailed, TurnTimeout
from pool.runtime import loop_thread
from tests.support.agent_rigs import EchoRig
from tests.support.faulty_agent import FORKS
from tests.support.leaks import no_leaks
from tests.support.processes import is_gone, wait_gone
from tests.support.waiting import wait_until

SOON = 0.5
"""Seconds for what is never to come. What is to come gets the defaults: the machine may be busy."""


@pytest.fixture
def rig(tmp_path):
    """Our own agent; at the end no process of it is left, nor anything of ours."""
    with no_leaks(), EchoRig(tmp_path / "rig") as rig:
        yield rig
        for backend in rig._backends:
            backend.destroy()
        wait_gone(*rig.forked(), *rig.started())
        wait_until(lambda: rig.processes() == [], lambda: f"nothing runs: {rig.processes()}")


def refused(rig, **config):
    """Have an agent that does not start; returns the error."""
    backend = rig.make(**config)
    rig._backends.append(backend)
    with pytest.raises(Exception) as caught:
        loop_thread().run(backend.connect())
        backend.ensure_session(rig.chat())
    assert backend.usable == ("refuses session/new" in str(caught.value))  # it may do better the next time
    backend.destroy()
    assert rig.processes() == []
    return caught.value


def recovers(rig, session_id, *texts):
    """A healthy process takes the chat up where it was."""
    agent = rig.backend(flags=["--load"])
    assert agent.ensure_session(rig.chat(session_id)).resumed
    assert agent.prompt("usable").text == f"turn {len(texts) + 1}: usable; earlier: [{', '.join(texts)}]"


# -- starting


@pytest.mark.parametrize(
    ("flags", "config", "reason", "told"),
    [
        ("--hang initialize", {"start_timeout": SOON}, "timeout", ["no answer to initialize within 0.5 s"]),
        ("--garbage 3 --slow-start 1000", {"start_timeout": 5}, "timeout", ["initialize", "this is a log line"]),
        ("--stderr 5 --slow-start 1000", {"start_timeout": 5}, "timeout", ["initialize", "the end of the flood"]),
        ("--exit start", {}, "setup", ["it ended with exit code 3", "no luck at start"]),
        ("--kill start", {}, "setup", ["it ended with exit code 137", "killed at start"]),
        ("--exit initialize", {}, "setup", ["it ended with exit code 3", "no luck at initialize"]),
        ("--refuse initialize", {}, "setup", ["it refuses initialize", "no initialize today"]),
        ("--protocol 99", {}, "setup", ["it speaks version 99 of the protocol, not 1"]),
        ("--garbage-forever", {}, "setup", ["lines that are no messages", "this is a log line"]),
        ("--line-forever", {}, "setup", ["it wrote a line of more than 8388608 bytes"]),
        ("", {"auth_method": "nothing"}, "setup", ["it refuses authenticate", "there is no way 'nothing' to log in"]),
        ("--hang authenticate", {"auth_method": "key", "start_timeout": 8}, "timeout", ["no answer to authenticate"]),
        ("--stubborn --exit initialize --fork daemon", {}, "setup", ["exit code 3"]),
        ("--hang new", {"session_timeout": SOON}, "timeout", ["no answer to session/new within 0.5 s"]),
        ("--refuse new", {}, "setup", ["it refuses session/new", "no new today"]),
        ("--exit new", {}, "setup", ["it ended with exit code 3", "no luck at new"]),
        ("--kill new", {}, "setup", ["it ended with exit code 137", "killed at new"]),
    ],
)
def test_an_agent_that_does_not_start_says_why(rig, flags, config, reason, told):
    """The error names the step, and brings what the agent said; only a person can help, so no retry is promised."""
    error = refused(rig, flags=flags.split(), **config)
    assert type(error) is BackendUnavailable
    assert (error.reason, error.retry_after) == (reason, None)
    for text in told:
        assert text in str(error)
    assert len(str(error)) < 6000


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["/no/such/agent", "acp"], ["'/no/such/agent'", "exit code 127", "not found"]),
        (["/etc/passwd"], ["exit code 126", "ermission denied"]),
        (["/bin/true"], ["exit code 0"]),
        (["/bin/sh", "-c", "exit 254"], ["exit code 254"]),
        (["/bin/cat"], ["/bin/cat", "it refuses initialize"]),
    ],
)
def test_a_command_that_is_no_agent_says_so(rig, command, told):
    """A missing program, one that may not be run, one that ends at once, one that repeats what it hears."""
    error = refused(rig, command=command)
    assert type(error) is BackendUnavailable
    for text in told:
        assert text in str(error)


def test_the_chat_goes_on_after_an_agent_that_did_not_start(rig):
    """Nothing of the failed starts is in the way of the next."""
    for flags in (["--exit", "start"], ["--kill", "start", "--fork", "daemon"], ["--slow-start", "1000"]):
        refused(rig, flags=flags, start_timeout=4)
    assert rig.ready(flags=[]).prompt("usable").text == "turn 1: usable; earlier: []"


def test_a_folder_that_leads_out_of_the_root_is_refused(rig):
    """Through a symlink, before anything runs there."""
    rig.root.mkdir()
    (rig.root / "link").symlink_to("/")
    assert type(refused(rig, cwd="link")) is PathEscapeError
    assert rig.started() == []


def test_a_folder_that_is_swapped_for_a_symlink_is_refused(rig):
    """Between the check and the start, too: the process itself looks again."""
    rig.root.mkdir()
    agent = rig.make(cwd="sub")
    rig._backends.append(agent)
    loop_thread().run(agent.site.open(None))
    (rig.root / "sub").rmdir()
    (rig.root / "sub").symlink_to("/")
    with pytest.raises(PathEscapeError, match="leaves its root through a symlink, to '/'"):
        loop_thread().run(agent._start())
    assert rig.started() == []


def test_an_agent_may_be_slow_and_talkative_before_it_begins(rig):
    """Lines that are no messages and a flood on stderr are no reason to give up."""
    agent = rig.ready(flags=["--slow-start", "0.5", "--garbage", "500", "--stderr", "5"])
    assert agent.prompt("alpha").text == "turn 1: alpha; earlier: []"


def test_an_agent_logs_in_by_the_way_that_its_config_names(rig):
    """Without complaint."""
    assert rig.ready(auth_method="key").prompt("alpha").text == "turn 1: alpha; earlier: []"


# -- sessions


@pytest.mark.parametrize("flags", ["--load", "--resume", "--load --resume"])
def test_a_session_comes_back_by_what_the_agent_can_do(rig, flags):
    """And what an agent replays meanwhile is not taken for the next turn's."""
    first = rig.ready(flags=flags.split())
    session_id = first.ensure_session(rig.chat(first._session_id)).session_id
    first.prompt("alpha")
    first.destroy()
    second = rig.backend(flags=flags.split())
    assert second.ensure_session(rig.chat(session_id)).resumed
    assert second.prompt("beta").text == "turn 2: beta; earlier: [alpha]"


def test_an_agent_that_cannot_bring_sessions_back_begins_anew(rig):
    """Without being asked for what it does not know."""
    first = rig.ready(flags=[])
    second = rig.backend(flags=["--hang", "load", "--hang", "resume"])
    session = second.ensure_session(rig.chat(first._session_id))
    assert (session.resumed, session.memory_lost) == (False, True)


@pytest.mark.parametrize(
    ("fault", "processes"),
    [("--hang", 2), ("--exit", 2), ("--kill", 2), ("--refuse", 1)],
)
@pytest.mark.parametrize("step", ["load", "resume"])
def test_a_session_that_does_not_come_back_costs_one_bounded_wait(rig, fault, processes, step):
    """Then the chat begins anew, in a new process if need be, and says that its memory is lost."""
    old = rig.ready(flags=[])
    session_id = old._session_id
    old.destroy()
    before = len(rig.started())
    agent = rig.backend(flags=[f"--{step}", fault, step], session_timeout=3)
    session = agent.ensure_session(rig.chat(session_id))
    assert (session.resumed, session.memory_lost) == (False, True)
    assert session.session_id not in {"", session_id}
    assert agent.prompt("alpha").text == "turn 1: alpha; earlier: []"
    assert agent.usable
    assert len(rig.started()) - before == processes
    assert len([pid for pid in rig.started() if not is_gone(pid)]) == 1


def test_an_agent_that_hangs_in_everything_is_an_error_in_the_end(rig):
    """One wait for the old session, one for a new one."""
    agent = rig.backend(flags=["--load", "--hang", "load", "--hang", "new"], session_timeout=SOON)
    with pytest.raises(BackendUnavailable, match="no answer to session/new") as caught:
        agent.ensure_session(rig.chat("old"))
    assert caught.value.reason == "timeout"
    assert not agent.usable


def test_close_session_has_the_agent_forget(rig):
    """One that can; another one is left alone."""
    for flags in (["--close"], []):
        agent = rig.ready(flags=flags)
        file = rig.store / f"{agent._session_id}.json"
        assert file.exists()
        agent.close_session(rig.chat(agent._session_id))
        assert file.exists() == (not flags)
        agent.close_session(rig.chat("another"))


@pytest.mark.parametrize(("fault", "reason"), [("--hang", "timeout"), ("--refuse", "setup"), ("--exit", "setup")])
def test_a_close_that_fails_is_told_and_bounded(rig, fault, reason):
    """The caller may try again, or give the session up."""
    agent = rig.ready(flags=["--close", fault, "close"], session_timeout=3)
    with pytest.raises(BackendUnavailable) as caught:
        agent.close_session(rig.chat(agent._session_id))
    assert caught.value.reason == reason


# -- turns


@pytest.mark.parametrize(
    ("prompt", "reason", "told", "lives"),
    [
        ("!error no luck", "refused", ["told to fail (no luck)"], True),
        ("!invalid", "garbage", ["stopReason"], True),
        ("!exit", "died", ["died: it ended with exit code 3", "Traceback: it crashed"], False),
        ("!kill", "died", ["died: it ended with exit code 137"], False),
        ("!garbage 2000", "garbage", ["lines that are no messages", "this is a log line"], False),
        ("!garbage_forever", "garbage", ["lines that are no messages", "this is a log line"], False),
        ("!line 16", "garbage", ["it wrote a line of"], False),
        ("!malformed", "garbage", ["lines that are no messages"], False),
    ],
)
def test_a_turn_that_fails_says_why(rig, prompt, reason, told, lives):
    """The chat goes on: in the same process if that lives, else a new one remembers."""
    agent = rig.ready()
    session_id = agent._session_id
    agent.prompt("alpha")
    with pytest.raises(TurnFailed) as caught:
        agent.prompt(prompt)
    assert type(caught.value) is TurnFailed
    assert caught.value.reason == reason
    for text in told:
        assert text in str(caught.value)
    assert "pydantic.dev" not in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert not agent.is_busy()
    assert agent.usable == lives
    if lives:
        assert agent.prompt("usable").text == f"turn 3: usable; earlier: [alpha, {prompt}]"
    else:
        agent.destroy()
        recovers(rig, session_id, "alpha", prompt)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("!garbage 100", "it went on"),
        ("!stderr 5", "it went on"),
        ("!message 3", "z" * (1 << 20)),
        ("!other", "for you"),
        ("!ext", 'error -32601: Method not found {"method": "example/unknown"}'),
        ("!elicit", 'error -32601: Method not found {"method": "elicitation/create"}'),
    ],
)
def test_what_is_odd_but_legal_does_no_harm(rig, prompt, text):
    """The turn ends as it should, and so does the next."""
    agent = rig.ready()
    turn = agent.prompt(prompt)
    assert (turn.text, turn.stop_reason) == (text, "end_turn")
    assert turn.truncated == (len(text) == 1 << 20)
    assert agent.prompt("usable").text == f"turn 2: usable; earlier: [{prompt}]"


def test_everything_that_an_agent_reports_is_passed_on(rig):
    """Thoughts, plans, tools with all that is known of them, and the tokens, of updates and of the answer."""
    updates = []
    turn = rig.ready().prompt("!reports", on_update=updates.append)
    look = {"id": "call", "title": "Look", "kind": "read"}
    assert updates == [
        {"type": "thought", "text": "hm"},
        {"type": "plan"},
        {"type": "tool", **look, "status": "pending"},
        {"type": "text", "text": "here"},
        {"type": "tool", **look, "status": "completed"},
    ]
    assert (turn.text, turn.stop_reason) == ("here", "max_tokens")
    assert turn.tool_calls == [{**look, "status": "completed"}]
    assert turn.usage == {"used": 7, "size": 100, "total_tokens": 3, "input_tokens": 1, "output_tokens": 2}


def test_what_comes_after_a_turn_belongs_to_no_turn(rig):
    """Neither to the one before nor to the one after."""
    agent = rig.ready()
    assert agent.prompt("!late").text == "in time"
    wait_until((rig.root / "late").exists, "the late report has arrived")
    assert agent.prompt("usable").text == "turn 2: usable; earlier: [!late]"


@pytest.fixture
def small_queue(monkeypatch):
    """Few updates fill it."""
    monkeypatch.setattr(output, "HIGH_WATER", 1 << 16)


def waits(agent):
    """Whether the reports of the agent have to wait for their follower."""
    return agent._client.collector._sink._resume


@pytest.mark.usefixtures("small_queue")
def test_a_flood_of_updates_waits_for_who_follows(rig):
    """None is lost, however slow the follower is."""
    agent = rig.ready()
    seen = []

    def on_update(update):
        if not seen:
            wait_until(lambda: waits(agent), "the agent waits", 60)
        seen.append(update["text"])

    turn = agent.prompt("!updates 6000", on_update=on_update)
    assert len(seen) == len(turn.text) == 6000


@pytest.mark.usefixtures("small_queue")
def test_a_follower_that_fails_in_a_flood_does_not_cost_the_agent(rig):
    """Nobody reads any more when it is cancelled; it must still be heard."""
    agent = rig.ready()

    def on_update(_):
        wait_until(lambda: waits(agent), "the agent waits", 60)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        agent.prompt("!updates 6000", on_update=on_update)
    assert agent.usable
    assert agent.prompt("usable").text == "turn 2: usable; earlier: [!updates 6000]"


@pytest.mark.parametrize("prompt", ["!hang", "!slow 60 one two", "!garbage 10"])
def test_an_agent_that_ignores_a_cancel_is_ended(rig, prompt):
    """The turn is over after ``cancel_timeout``, and a new process remembers."""
    flags = ["--load", "--ignore-cancel", "--stubborn"] + (["--hang", "prompt"] if prompt == "!garbage 10" else [])
    agent = rig.ready(flags=flags, cancel_timeout=SOON)
    session_id = agent._session_id
    with pytest.raises(TurnTimeout):
        agent.prompt(prompt, timeout=SOON)
    assert not agent.usable
    wait_gone(*rig.started())
    with pytest.raises(BackendUnavailable) as caught:
        agent.ensure_session(rig.chat(session_id))
    assert (caught.value.reason, caught.value.retry_after) == ("lost", 0.0)
    agent.destroy()
    recovers(rig, session_id, prompt)


def test_an_agent_that_is_cancelled_and_ignores_it_ends_its_turn_as_cancelled(rig):
    """Who cancels gets the result that was asked for, though the agent had to be ended."""
    agent = rig.ready(flags=["--ignore-cancel"], cancel_timeout=SOON)
    turn = agent.prompt("!hang", on_update=lambda _: agent.cancel())
    assert (turn.stop_reason, turn.text) == ("cancelled", "it hangs")
    wait_gone(*rig.started())


def test_an_agent_that_is_killed_between_turns_is_not_used_again(rig):
    """The pool sees at once that it is gone; who asks it anyway is told."""
    agent = rig.ready()
    session_id = agent._session_id
    os.kill(rig.started()[0], signal.SIGKILL)
    wait_until(lambda: not agent.usable, "it is lost")
    with pytest.raises(TurnFailed, match="exit code 137"):
        agent.prompt("alpha")
    agent.destroy()
    recovers(rig, session_id)


# -- what it asks for


def test_permissions_are_answered_by_the_policy(rig):
    """Each kind by its own answer, the others by the default; the result tells all."""
    agent = rig.ready(permissions={"default": "deny", "read": "allow", "fetch": "allow", "edit": "deny"})
    turn = agent.prompt("!ask read edit execute fetch")
    assert turn.text == "read=True edit=False execute=False fetch=True"
    assert turn.permissions == [
        {"title": f"to {kind}", "kind": kind, "answer": answer}
        for kind, answer in [("read", "allow"), ("edit", "deny"), ("execute", "deny"), ("fetch", "allow")]
    ]


def test_a_permission_without_options_is_refused(rig):
    """Though the policy would allow it: there is nothing to choose."""
    turn = rig.ready(permissions="allow").prompt("!ask_without_options")
    assert turn.text == "cancelled"
    assert turn.permissions == [{"title": "odd", "kind": "edit", "answer": "deny"}]


def test_files_are_those_of_its_folder(rig):
    """Relative and absolute paths inside are served; what leads out is refused, and nothing out there is touched."""
    secret = rig.folder / "secret"
    secret.write_text("secret")
    rig.root.mkdir()
    (rig.root / "link").symlink_to(rig.folder)
    (rig.root / "lines").write_text("one\ntwo\nthree\n")
    agent = rig.ready()
    for prompt, told in [
        ("!write sub/a hello", "done"),
        ("!read sub/a", "hello"),
        ("!read HERE/sub/a", "hello"),
        ("!write HERE/b there", "done"),
        ("!lines lines", "two\n"),
        ("!read nothing", "error -32002: Resource not found"),
        ("!read ../secret", "leaves the root"),
        ("!write ../secret x", "leaves the root"),
        ("!read HERE/../secret", "error -32002: Resource not found"),
        ("!read link/secret", "leaves the root through a symlink"),
        ("!write link/secret x", "leaves the root through a symlink"),
        ("!read /etc/passwd", "error -32002: Resource not found"),
        ("!read sub", "error -32602"),
    ]:
        assert told in agent.prompt(prompt).text, prompt
    assert (rig.root / "b").read_text() == "there"
    assert secret.read_text() == "secret"


def test_a_terminal_is_read_killed_and_released(rig):
    """What it has written stays until it is released."""
    text = rig.ready().prompt("!terminal echo $$ > pid; echo started; sleep 1000").text
    answer, _, error = text.partition("error ")
    assert json.loads(answer) == {"running": True, "exit_code": 137, "output": "started\n"}
    assert "there is no terminal 'terminal-1'" in error
    wait_gone(int((rig.root / "pid").read_text()))


def test_a_terminal_keeps_the_end_of_its_output(rig):
    """As many bytes as the agent wants."""
    text = rig.ready().prompt("!terminal seq 10000; sleep 1000").text
    output = json.loads(text.partition("error ")[0])["output"]
    assert 0 < len(output) <= 1000


@pytest.mark.parametrize(
    ("cwd", "told"),
    [("", "0: {root}\n"), ("sub", "0: {root}/sub\n"), ("../..", "255: "), ("link", "255: "), ("nothing", "255: ")],
)
def test_a_terminal_runs_in_the_folder(rig, cwd, told):
    """Or in one below it; nowhere else."""
    (rig.root / "sub").mkdir(parents=True)
    (rig.root / "link").symlink_to("/")
    assert rig.ready().prompt(f"!terminal_in {cwd}").text.startswith(told.format(root=rig.root))


def test_terminals_are_limited_and_end_with_the_agent(rig):
    """One too many is refused; destroy ends those that were never released."""
    agent = rig.ready()
    text = agent.prompt("!terminals 40").text
    assert text.count("done") == 32
    assert text.count("32 terminals are open: release one first") == 8
    file = rig.root / "terminals"

    def begun():
        lines = file.read_text().split() if file.exists() else []
        return len(lines) == 32 and lines

    pids = wait_until(begun, "all have begun", 30)
    agent.destroy()
    wait_gone(*map(int, pids))


# -- processes


@pytest.mark.parametrize("kind", FORKS)
def test_what_an_agent_forks_ends_with_it(rig, kind):
    """Destroyed, whatever session and whatever signal handlers it has."""
    agent = rig.ready()
    agent.prompt(f"!fork {kind}")
    (pid,) = wait_until(rig.forked, "it has begun")
    assert not is_gone(pid)
    agent.destroy()
    assert is_gone(pid)


def test_what_an_agent_forks_ends_when_it_crashes(rig):
    """Without anybody destroying it."""
    agent = rig.ready()
    agent.prompt(f"!fork {' '.join(FORKS)}")
    wait_until(lambda: len(rig.forked()) == len(FORKS), "they have begun")
    with pytest.raises(TurnFailed, match="exit code 3"):
        agent.prompt("!exit")
    wait_gone(*rig.forked())


def test_a_stubborn_agent_ends_all_the_same(rig):
    """One that ignores TERM and the end of its input."""
    agent = rig.ready(flags=["--stubborn", *(word for kind in FORKS for word in ("--fork", kind))])
    wait_until(lambda: len(rig.forked()) == len(FORKS), "they have begun")
    agent.destroy()
    assert rig.processes() == []


def test_a_destroy_that_is_cut_short_ends_the_agent_all_the_same(rig):
    """The pool gives a close so many seconds; then nobody waits, but the agent still ends."""
    agent = rig.ready(flags=["--stubborn"])

    async def main():
        async with asyncio.timeout(0.2):
            await agent.adestroy()

    with pytest.raises(TimeoutError):
        loop_thread().run(main())
    wait_gone(*rig.started())
