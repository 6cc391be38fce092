"""How commands are ended before their time: timeout, cancel, destroy. Nothing of them stays."""

import asyncio
import threading

import pytest

from pool.errors import BackendClosed, CommandTimeout
from pool.runtime import loop_thread
from tests.conformance.conftest import CHANNELS, OPENSSH
from tests.support.processes import has_pid, wait_gone, wait_pid
from tests.support.waiting import PATIENCE, wait_until

# A shell, a plain child, a child and its child that ignore TERM, and one that is stopped.
FAMILY = """
sh -c 'trap "" TERM HUP INT; sh -c "echo \\$\\$ > grandchild; while :; do sleep 1; done" & echo $$ > stubborn; wait' &
sleep 1000 & echo $! > plain
sleep 1000 & kill -STOP $!; echo $! > stopped
echo $$ > main; echo "the last words"; wait"""
NAMES = ("main", "plain", "stopped", "stubborn", "grandchild")


def family(shell):
    return [wait_pid(shell.root / name) for name in NAMES]


def test_a_timeout_kills_the_whole_family(shell, sh):
    """After CommandTimeout no process of the command's group is left, and the connection goes on."""
    sh.exec("true")
    logins = shell.logins()
    for seconds in PATIENCE:
        with pytest.raises(CommandTimeout, match="killed after") as caught:
            sh.exec(FAMILY, timeout=seconds)
        if caught.value.tail and all(has_pid(shell.root / name) for name in NAMES):
            break
    assert (caught.value.timeout, caught.value.tail) == (seconds, "the last words")
    wait_gone(*family(shell))
    assert sh.exec("echo usable").stdout == "usable\n"
    assert shell.logins() == logins


@pytest.mark.parametrize("shell", ["local", "loopback", OPENSSH[0]], indirect=True)
def test_a_timeout_kills_who_holds_the_output_of_a_shell_that_has_ended(shell, sh):
    """The command has ended, a child of it has not, and exec waits for its output: the timeout ends that too.

    Not over a channel of its own: there the lifeline is cut with the session's first process, as
    `docs/architecture.md` tells.
    """
    for seconds in PATIENCE:
        with pytest.raises(CommandTimeout):
            sh.exec("sleep 1000 & echo $! > pid", timeout=seconds)
        if has_pid(shell.root / "pid"):
            break
    wait_gone(wait_pid(shell.root / "pid"))
    assert sh.exec("echo usable").stdout == "usable\n"


def test_a_timeout_of_a_command_that_floods(shell, sh):
    """A command that writes without end is ended like any other, with on_output and without."""
    for number, on_output in enumerate((None, lambda *_: None)):
        file = shell.root / f"pid{number}"
        for seconds in PATIENCE:
            with pytest.raises(CommandTimeout):
                sh.exec(f"echo $$ > {file.name}; yes", timeout=seconds, on_output=on_output)
            if has_pid(file):
                break
        wait_gone(wait_pid(file))


def test_a_command_that_makes_it_in_time_is_no_timeout(sh):
    """A timeout that is not reached does nothing."""
    assert sh.exec("echo fast", timeout=100).stdout == "fast\n"


def test_timeouts_do_not_use_channels_up(shell, sh):
    """More commands time out than there are channels, and the next one runs on the same connection."""
    sh.exec("true")
    logins = shell.logins()

    async def many():
        return await asyncio.gather(*(sh.aexec("sleep 1000", timeout=0.5) for _ in range(20)), return_exceptions=True)

    results = loop_thread().run(many())
    assert {type(result) for result in results} == {CommandTimeout}
    assert sh.exec("echo usable", timeout=60).stdout == "usable\n"
    assert shell.logins() == logins


def test_a_cancelled_command_is_killed(shell, run):
    """Cancelling the task that awaits a command kills the command's group before the cancel comes back."""
    backend = shell.backend()

    async def main():
        task = asyncio.create_task(backend.aexec(FAMILY))
        await asyncio.to_thread(family, shell)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    wait_gone(*family(shell))
    assert backend.exec("echo usable").stdout == "usable\n"


def test_commands_cancelled_at_any_moment_leave_nothing(shell, sh):
    """A cancel may come while a command waits for a channel, opens it, runs or ends."""
    sh.exec("true")
    logins = shell.logins()

    async def main():
        tasks = [asyncio.create_task(sh.aexec(f"echo $$ > pid{n}; sleep 1000", env={"A": "1"})) for n in range(40)]
        for task in tasks:
            await asyncio.sleep(0.002)
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(result) for result in loop_thread().run(main())} == {asyncio.CancelledError}
    for file in shell.root.glob("pid*"):
        if text := file.read_text().strip():
            wait_gone(int(text))
    assert [sh.exec("echo usable", timeout=60).stdout for _ in range(3)] == ["usable\n"] * 3
    assert shell.logins() == logins


def test_a_command_of_which_the_end_was_not_read_is_no_success(remote):
    """It has ended, with all of its output under way; the reader is slow, and the backend is destroyed."""
    sh = remote.backend(max_output=1 << 23)
    sh.exec("true")

    def slow(*_):
        wait_gone(wait_pid(remote.root / "pid"))
        sh.destroy()

    try:
        result = sh.exec("echo $$ > pid; head -c 1800000 /dev/zero", encoding=None, on_output=slow)
    except BackendClosed:
        pass
    else:
        assert result.stdout == bytes(1_800_000)


def test_destroy_ends_running_commands(shell, sh):
    """A command under way raises BackendClosed, and its process is gone."""
    errors = []

    def run():
        try:
            sh.exec(FAMILY)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    pids = family(shell)
    sh.destroy()
    thread.join(30)
    assert [type(error) for error in errors] == [BackendClosed]
    wait_gone(*pids)


@pytest.mark.parametrize("moment", range(0, 30, 3))
def test_destroy_ends_a_command_that_is_starting(shell, moment):
    """At whatever turn of the loop it comes: the command may run before its start is over."""
    backend = shell.backend()
    backend.exec("true")

    async def main():
        call = asyncio.create_task(backend.aexec("echo $$ > pid; sleep 1000"))
        for _ in range(moment):
            await asyncio.sleep(0)
        await backend.adestroy()
        done, _ = await asyncio.wait({call}, timeout=20.0)
        assert done, "the call still waits"
        return call.exception()

    assert isinstance(loop_thread().run(main()), BackendClosed)
    if (shell.root / "pid").exists() and (pid := (shell.root / "pid").read_text()):
        wait_gone(int(pid))


@pytest.mark.parametrize("remote", CHANNELS, indirect=True)
def test_destroy_ends_commands_that_wait_for_a_channel(remote):
    """Who waits in line when the backend is destroyed is told, not forgotten."""
    backend = remote.backend(max_channels=1)
    errors = []

    def run(command):
        try:
            backend.exec(command)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f"echo $$ > pid{n}; sleep 1000",)) for n in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: any(remote.root.glob("pid*")), "one runs")
    wait_until(lambda: len(backend.channels._waiting) == 3, "the others wait")
    backend.destroy()
    for thread in threads:
        thread.join(30)
    assert [type(error) for error in errors] == [BackendClosed] * 4
