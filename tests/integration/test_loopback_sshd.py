"""The loopback SSH server behaves like OpenSSH where it matters: the same tests over both."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import psutil
import pytest

from pool.loopback_sshd import LoopbackSshd, SshdInfo
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.services import require_service

DEADLINE = 20.0  # seconds until a test that waits for something gives up
MB = 1024 * 1024


def loopback(folder: Path, **options: Any) -> LoopbackSshd:
    return LoopbackSshd(folder / "sshd", home=folder / "home", **options)


def openssh(folder: Path, **options: Any) -> OpenSshd:
    require_service("OpenSSH's sshd", sshd_binary() is not None)
    return OpenSshd(folder / "sshd", **options)


KINDS = [loopback, pytest.param(openssh, marks=pytest.mark.openssh)]


@pytest.fixture(params=KINDS)
def make(request):
    """How to make a server of this kind: ``make(folder, **options)``."""
    return request.param


@pytest.fixture
def server(make, tmp_path) -> Iterator[LoopbackSshd | OpenSshd]:
    with make(tmp_path) as server:
        yield server


def connect(info: SshdInfo, **options: Any) -> Any:
    """Connect as a plain client that trusts nothing but the files of *info*."""
    defaults: dict[str, Any] = {
        "username": info.username,
        "client_keys": [str(info.client_key)],
        "known_hosts": str(info.known_hosts),
    }
    return asyncssh.connect("127.0.0.1", info.port, config=None, agent_path=None, **{**defaults, **options})


def talk(info: SshdInfo, talker: Any, **options: Any) -> Any:
    """Run ``talker(connection)`` over a new connection and return what it returns."""

    async def main() -> Any:
        async with asyncio.timeout(DEADLINE), connect(info, **options) as connection:
            return await talker(connection)

    return asyncio.run(main())


def run(info: SshdInfo, command: str, **options: Any) -> asyncssh.SSHCompletedProcess:
    """Run one command over a new connection."""
    return talk(info, lambda connection: connection.run(command, **options))


async def run_when_free(connection: Any, command: str) -> Any:
    """Run *command* as soon as there is a slot: OpenSSH frees one a moment after it has confirmed the close."""
    while True:
        try:
            return (await connection.run(command)).stdout
        except asyncssh.ChannelOpenError as refusal:
            assert refusal.code == asyncssh.OPEN_CONNECT_FAILED
            await asyncio.sleep(0.01)


def wait_gone(pid: int) -> None:
    """Wait until the process has ended; a zombie counts as ended."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    gone = poll.poll(DEADLINE * 1000)
    os.close(watch)
    assert gone, f"process {pid} is still there"


def test_exit_status_stdout_and_stderr_arrive(server):
    """A command's status and both of its streams reach the client unmixed."""
    result = run(server.info, "echo out; echo err >&2; exit 7")
    assert (result.exit_status, result.stdout, result.stderr) == (7, "out\n", "err\n")


def test_a_command_killed_by_a_signal_reports_it(server):
    """A signal is an exit signal, not a status."""
    result = run(server.info, "kill -TERM $$")
    assert (result.exit_status, result.exit_signal[0], result.returncode) == (-1, "TERM", -signal.SIGTERM)


def test_end_of_input_reaches_the_command(server):
    """A command that reads to the end of its input gets that end."""
    assert run(server.info, "cat; echo done", input="text ").stdout == "text done\n"


def test_bytes_pass_unchanged_both_ways(server):
    """Neither direction decodes, translates or loses anything, nor when both are busy at once."""
    data = bytes(range(256)) * (12 * MB // 256)
    assert run(server.info, "cat", input=data, encoding=None).stdout == data


def test_twenty_megabytes_of_output_arrive(server):
    """Large output arrives complete, and is followed by the status."""
    result = run(server.info, "head -c 20971520 /dev/zero; exit 3", encoding=None)
    assert (result.stdout == bytes(20 * MB), result.exit_status) == (True, 3)


def test_input_that_nobody_reads_is_dropped(server):
    """A command that ends without reading its input ends all the same."""
    # It reads a byte first: asyncssh fails to send input to a command that has ended before it began to.
    result = run(server.info, "head -c 1 >/dev/null; exec 0<&-; echo closed", input=bytes(8 * MB), encoding=None)
    assert (result.stdout, result.exit_status) == (b"closed\n", 0)


def test_commands_start_at_home_with_a_clean_environment(server):
    """A command starts in the home folder and inherits nothing from the server's environment."""
    lines = run(server.info, "pwd; env").stdout.splitlines()
    names = {line.partition("=")[0] for line in lines[1:]}
    assert lines[0] == str(server.info.home)
    assert {"HOME", "USER", "PATH", "SHELL"} <= names
    assert names <= {
        "HOME",
        "USER",
        "PATH",
        "SHELL",
        "LANG",
        "PWD",
        "OLDPWD",
        "LOGNAME",
        "MAIL",
        "SHLVL",
        "_",
    } | {
        "SSH_CLIENT",
        "SSH_CONNECTION",
    }


def test_a_command_leads_a_process_group_of_its_own(server):
    """Group and session ids are the command's pid: one kill reaches all of it and nothing else."""
    pid, group, session = run(server.info, "echo $$; ps -o pgid=,sid= -p $$").stdout.split()
    assert pid == group == session


def test_a_signal_request_reaches_the_whole_group(server):
    """A signal sent over the channel ends the command and its children."""

    async def talker(connection):
        process = await connection.create_process("sleep 1000 & echo $!; wait")
        child = int(await process.stdout.readline())
        process.send_signal("KILL")
        result = await process.wait()
        return child, result.exit_signal[0]

    child, name = talk(server.info, talker)
    assert name == "KILL"
    wait_gone(child)


def test_a_signal_right_behind_the_command_is_not_lost(tmp_path):
    """A signal sent as soon as the command is accepted reaches it (OpenSSH can lose it: the group is not made yet)."""

    async def talker(connection):
        process = await connection.create_process("exec sleep 1000")
        process.send_signal("KILL")
        return (await process.wait()).exit_signal[0]

    with loopback(tmp_path) as server:
        assert talk(server.info, talker) == "KILL"


def test_input_to_a_closed_stdin_is_taken_and_dropped(server):
    """A command that has closed its stdin and goes on does not block the client's writes."""

    async def talker(connection):
        process = await connection.create_process(
            "head -c 200000 >/dev/null; exec 0<&-; exec sleep 1000", encoding=None
        )
        process.stdin.write(bytes(8 * MB))
        await process.stdin.drain()
        process.kill()
        return (await process.wait()).exit_signal[0]

    assert talk(server.info, talker) == "KILL"


def test_a_background_child_that_holds_stdin_does_not_hold_the_channel(server):
    """The end of a command is the end of its exit status and its output, whoever still has its input."""

    async def talker(connection):
        process = await connection.create_process("exec 3<&0; sleep 1000 <&3 >/dev/null 2>&1 & echo $!; exit 4")
        result = await process.wait()
        await connection.run(f"kill {result.stdout}")
        return result.exit_status

    assert talk(server.info, talker) == 4


def test_a_closed_channel_ends_a_writer(server):
    """A command that goes on writing to a closed channel dies of it."""

    async def talker(connection):
        process = await connection.create_process("echo $$; exec yes")
        pid = int(await process.stdout.readline())
        process.close()
        return pid

    async def cut(connection):
        pid = await talker(connection)
        connection.abort()
        return pid

    wait_gone(talk(server.info, talker))
    wait_gone(talk(server.info, cut))


def test_a_closed_channel_ends_a_reader_but_kills_nobody(server):
    """Closing the channel closes the command's pipes, which is all that happens to it."""

    async def talker(connection):
        process = await connection.create_process("echo $$; cat >/dev/null; exec sleep 1000")
        pid = int(await process.stdout.readline())
        process.close()
        # cat ends, and the shell becomes sleep under the same pid
        probe = f'until [ "$(ps -o comm= -p {pid})" = sleep ]; do kill -0 {pid} || exit 1; done; kill -9 {pid}'
        return (await connection.run(probe)).exit_status

    assert talk(server.info, talker) == 0


def test_a_cut_connection_kills_nobody(server):
    """A command that is silent outlives its connection."""

    async def talker(connection):
        process = await connection.create_process("echo $$; exec sleep 1000")
        pid = int(await process.stdout.readline())
        connection.abort()
        return pid

    pid = talk(server.info, talker)
    assert run(server.info, f"kill -9 {pid}").exit_status == 0


def test_a_slow_reader_stops_the_command_not_the_server(server):
    """Output that nobody reads stays with the command: nothing piles up in the server."""

    async def talker(connection):
        process = await connection.create_process(
            "sh -c 'echo $$; exec head -c 209715200 /dev/zero' & wait", encoding=None, window=64 * 1024
        )
        pid = int(await process.stdout.readline())
        # Blocked in its write: asleep twice in a row, with the same number of bytes written.
        probe = f'old=x; until [ "$old" = "$new" ]; do old=$(grep wchar /proc/{pid}/io); sleep 0.1; new=$(grep wchar /proc/{pid}/io); done; echo $new'
        written = int((await connection.run(probe)).stdout.split()[1])
        memory = max(rss(pid) for pid in tree(server.pid))
        process.close()
        return written, memory

    written, memory = talk(server.info, talker)
    assert written < 4 * MB
    assert memory < 100 * MB


def tree(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def rss(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def test_sftp_writes_reads_renames_and_resolves(server):
    """Relative paths start at home, absolute ones are absolute, and posix-rename replaces."""
    name = f"sftp-{uuid.uuid4().hex}"

    async def talker(connection):
        async with connection.start_sftp_client() as sftp:
            await sftp.mkdir(name)
            async with sftp.open(f"{name}/a", "wb") as file:
                await file.write(bytes(range(256)))
            async with sftp.open(f"{name}/b", "wb") as file:
                await file.write(b"old")
            with pytest.raises(asyncssh.SFTPFailure):
                await sftp.rename(f"{name}/a", f"{name}/b")
            await sftp.posix_rename(f"{name}/a", f"{name}/b")
            await sftp.symlink("b", f"{name}/link")
            async with sftp.open(f"{server.info.home}/{name}/link", "rb") as file:
                content = await file.read()
            assert await sftp.realpath(".") == str(server.info.home)
            assert await sftp.realpath(f"{name}/link") == f"{server.info.home}/{name}/b"
            assert await sftp.realpath(f"{name}/../{name}/new") == f"{server.info.home}/{name}/new"
            with pytest.raises(asyncssh.SFTPNoSuchFile):
                await sftp.realpath(f"{name}/missing/new")
            with pytest.raises(asyncssh.SFTPNoSuchFile):
                await sftp.stat(f"{name}/a")
            assert await sftp.readlink(f"{name}/link") == "b"
            assert await sftp.exists("/bin/sh")
            await sftp.rmtree(name)
            return content

    assert talk(server.info, talker) == bytes(range(256))


def test_sessions_over_the_limit_are_refused_and_the_connection_stays(make, tmp_path):
    """MaxSessions counts commands and SFTP, refuses with code 2, and harms nothing that runs."""

    async def talker(connection):
        process = await connection.create_process("cat")
        async with connection.start_sftp_client() as sftp:
            with pytest.raises(asyncssh.ChannelOpenError) as refusal:
                await connection.run("true")
            assert (refusal.value.code, refusal.value.reason) == (2, "open failed")
            assert await sftp.exists(".")
            await sftp.realpath(".")
        await sftp.wait_closed()
        assert await run_when_free(connection, "echo free") == "free\n"
        process.stdin.write("still here")
        process.stdin.write_eof()
        return (await process.wait()).stdout

    with make(tmp_path, max_sessions=2) as server:
        assert talk(server.info, talker) == "still here"


def test_a_closed_channel_keeps_its_slot_until_the_command_has_ended(make, tmp_path):
    """The limit is about commands that run, not about channels that are open."""

    async def talker(connection):
        process = await connection.create_process("echo $$; exec sleep 1000")
        pid = int(await process.stdout.readline())
        process.close()
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.run("true")
        return pid

    with make(tmp_path, max_sessions=1) as server:
        pid = talk(server.info, talker)
        run(server.info, f"kill {pid}")


def test_commands_one_after_another_need_one_slot(tmp_path):
    """A slot is free as soon as the client knows that its command has ended (OpenSSH may take a moment longer)."""

    async def talker(connection):
        for _ in range(20):
            assert (await connection.run("true")).exit_status == 0
            sftp = await connection.start_sftp_client()
            sftp.exit()
            await sftp.wait_closed()

    with loopback(tmp_path, max_sessions=1) as server:
        talk(server.info, talker)


def test_another_key_is_refused(server):
    """Only the client key of the folder logs in."""
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    with pytest.raises(asyncssh.PermissionDenied):
        run_with(server.info, client_keys=[stranger])
    with pytest.raises(asyncssh.PermissionDenied):
        run_with(server.info, client_keys=None, password="anything")


def run_with(info: SshdInfo, **options: Any) -> None:
    talk(info, lambda connection: connection.run("true"), **options)


def test_the_host_key_is_the_one_in_known_hosts(server, tmp_path):
    """known_hosts names this host and port; another key for them is refused."""
    run_with(server.info)
    known, _, key = server.info.known_hosts.read_text().partition(" ")
    assert known == f"[127.0.0.1]:{server.info.port}"
    assert key.startswith("ssh-ed25519 ")
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    (tmp_path / "wrong").write_text(f"{known} {other}")
    with pytest.raises(asyncssh.HostKeyNotVerifiable):
        run_with(server.info, known_hosts=str(tmp_path / "wrong"))


def test_private_keys_are_private(server):
    """Nobody else may read the keys."""
    keys = [server.info.client_key, server.info.client_key.with_name("host_key")]
    assert [key.stat().st_mode & 0o777 for key in keys] == [0o600, 0o600]


def test_logins_are_counted_where_the_client_cannot_pretend(server):
    """One login per connection, however many commands it runs; a refused one is none."""

    async def talker(connection):
        for _ in range(3):
            await connection.run("true")

    before = server.info.count_logins()
    talk(server.info, talker)
    talk(server.info, talker)
    with pytest.raises(asyncssh.PermissionDenied):
        run_with(server.info, client_keys=[asyncssh.generate_private_key("ssh-ed25519")])
    assert (before, server.info.count_logins()) == (0, 2)


def test_pty_and_shell_are_refused_politely(tmp_path):
    """The loopback server has neither, and says so instead of hanging."""

    async def talker(connection):
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.create_process("true", term_type="xterm")
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.create_process()
        return (await connection.run("echo fine")).stdout

    with loopback(tmp_path, max_sessions=1) as server:
        assert talk(server.info, talker) == "fine\n"


def test_users_of_any_name_log_in_and_are_logged(tmp_path):
    """Two connections with different user names: each sees its own USER, and the log names both."""
    with loopback(tmp_path) as server:
        users = [talk(server.info, lambda c: c.run("echo $USER"), username=name).stdout for name in ("ann", "bob")]
        assert users == ["ann\n", "bob\n"]
        assert server.info.logins.read_text().splitlines() == ["ann", "bob"]


def test_a_server_started_again_is_the_same_host(tmp_path):
    """Same folder and port: the files that clients hold keep working."""
    with loopback(tmp_path) as server:
        info = server.info
        run_with(info)
    with loopback(tmp_path, port=info.port) as again:
        assert again.info == info
        run_with(info)
    assert info.count_logins() == 2


def test_a_server_that_cannot_start_says_so(tmp_path, capfd):
    """A taken port is an error at once, with the reason on stderr."""
    with loopback(tmp_path / "first") as server:
        with pytest.raises(RuntimeError, match="did not start"):
            loopback(tmp_path / "second", port=server.info.port).start()
    assert "address already in use" in capfd.readouterr().err


def test_the_server_has_no_complaints_about_ordinary_use(tmp_path, capfd):
    """No unhandled exception is logged when commands, their pipes and channels end in every order."""

    async def talker(connection):
        for command in (
            "true",
            "cat",
            "exec 0<&-; true",
            "head -c 100000 >/dev/null",
            "kill $$",
            "yes | head -c 1000000",
        ):
            for ending in ("write_eof", "close"):
                for _ in range(5):
                    process = await connection.create_process(command, encoding=None)
                    with contextlib.suppress(BrokenPipeError):  # it may have ended already
                        process.stdin.write(bytes(MB))
                    getattr(process.channel, ending)()
                    await process.wait(check=False)

    with loopback(tmp_path, max_sessions=100) as server:
        talk(server.info, talker)
    assert capfd.readouterr().err == ""


def test_a_stopped_server_leaves_no_command_behind(server):
    """Stopping the server ends what it runs, with all of its group, and cuts the client off."""

    async def talker(connection):
        process = await connection.create_process("sleep 1000 & echo $$ $!; wait")
        pids = [int(pid) for pid in (await process.stdout.readline()).split()]
        await asyncio.to_thread(server.stop)
        with pytest.raises((asyncssh.ConnectionLost, asyncssh.ChannelOpenError)):
            await connection.run("true")
        return pids

    for pid in talk(server.info, talker):
        wait_gone(pid)


def test_the_server_ends_when_its_parent_dies(tmp_path):
    """A parent killed without a chance to clean up takes the server, and what it runs, with it."""
    script = (
        "import sys, pathlib, signal; from pool.loopback_sshd import LoopbackSshd\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "server = LoopbackSshd(folder / 'sshd', home=folder / 'home'); server.start()\n"
        "print(server.pid, flush=True); signal.pause()"
    )
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env) as parent:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    wait_gone(pid)


@pytest.mark.openssh
def test_openssh_sessions_can_be_frozen_and_thawed(tmp_path):
    """A frozen host answers nothing and then goes on as if nothing had happened."""

    async def talker(connection):
        process = await connection.create_process("cat")
        with server.frozen():
            process.stdin.write("late\n")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(process.stdout.readline(), 0.3)
        return await process.stdout.readline()

    with openssh(tmp_path) as server:
        assert talk(server.info, talker) == "late\n"


@pytest.mark.openssh
def test_openssh_sessions_can_be_killed_while_the_listener_goes_on(tmp_path):
    """Killed sessions are lost connections; new ones are served, and stop ends the orphaned command."""

    async def talker(connection):
        process = await connection.create_process("echo $$; exec sleep 1000")
        pid = int(await process.stdout.readline())
        server.kill_sessions()
        await connection.wait_closed()
        return pid

    with openssh(tmp_path) as server:
        orphan = talk(server.info, talker)
        assert run(server.info, f"kill -0 {orphan}").exit_status == 0
        server.restart()
        wait_gone(orphan)
        run_with(server.info)
        server.kill()
        with pytest.raises(ConnectionRefusedError):
            run_with(server.info)
