"""What goes into a command and what comes out of it, over every kind of backend."""

import asyncio
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pool.errors import CommandFailed, CommandTimeout, ConfigError, FileMissing, FileOperationFailed, PathEscapeError
from pool.runtime import loop_thread
from tests.conformance.conftest import CHANNELS
from tests.support.processes import has_pid, wait_gone, wait_pid

PATH = os.environ["PATH"]
NASTY = 'it\'s "quoted" $HOME `id` \\n \\\\ %s %% \t;&|<>(){}*?[]~#! é ☃ 𝄞'


def test_stdout_stderr_and_exit_code_arrive_unmixed(backend):
    """A result tells both streams, the exit code and how long it took."""
    result = backend.exec("echo out; echo err >&2; exit 3", check=False)
    assert (result.exit_code, result.stdout, result.stderr, result.truncated) == (3, "out\n", "err\n", False)
    assert result.duration > 0


def test_a_failed_command_raises_with_code_and_stderr_tail(backend):
    """The error carries the exit code and the end of stderr, and its message names the command."""
    with pytest.raises(CommandFailed, match="exit 7") as caught:
        backend.exec("echo out; echo first >&2; echo reason >&2; exit 7")
    assert (caught.value.exit_code, caught.value.tail) == (7, "first\nreason")


def test_a_failed_command_with_silent_stderr_quotes_stdout(backend):
    """With nothing on stderr the tail is that of stdout."""
    with pytest.raises(CommandFailed) as caught:
        backend.exec("echo only out; exit 1")
    assert caught.value.tail == "only out"


def test_the_tail_of_a_failure_is_short_and_from_the_end(backend):
    """A failure after much output carries the last part of it only."""
    with pytest.raises(CommandFailed) as caught:
        backend.exec("i=0; while [ $i -lt 3000 ]; do echo line $i >&2; i=$((i+1)); done; exit 1")
    assert caught.value.tail.endswith("line 2999")
    assert len(caught.value.tail) <= 2000


def test_a_command_that_is_not_found_says_so(backend):
    """127 and the shell's own words."""
    # "Permission denied" where a folder of PATH is closed to the user, as dash has it.
    with pytest.raises(CommandFailed, match=r"no-such-program-here: (not found|Permission denied)") as caught:
        backend.exec("no-such-program-here")
    assert caught.value.exit_code == 127


def test_a_syntax_error_is_a_failed_command(backend):
    """The shell's complaint is a failure like any other."""
    assert backend.exec("if; then", check=False).exit_code != 0


@pytest.mark.parametrize("number", [9, 10, 15])  # HUP and INT may be ignored already: nohup, "&"
def test_death_by_a_signal_is_128_plus_its_number(sh, number):
    """A command that a signal ended has the exit code that a shell would tell."""
    assert sh.exec(f"kill -{number} $$", check=False).exit_code == 128 + number


def test_a_pipeline_of_quotes_newlines_and_unicode_arrives_verbatim(backend):
    """Nothing in a command is interpreted before its own shell does."""
    assert backend.exec(f"cat <<'END'\n{NASTY}\n\n  two\nEND").stdout == f"{NASTY}\n\n  two\n"


@pytest.mark.parametrize("command", ["-n x", "-c 'echo no'", "--version", "'$(echo no)'"])
def test_a_leading_dash_is_not_an_option(sh, command):
    """A command that begins with a dash is looked up as a command."""
    assert sh.exec(command, check=False).exit_code in {2, 127}


@pytest.mark.parametrize("size", [59_000, 61_000, 130_000, 200_000])
@pytest.mark.parametrize("letter", ["x", "'", "☃"])
def test_long_commands_arrive_whole(sh, size, letter):
    """A command may be longer than what one argument of a Linux process can hold, counted in bytes."""
    text = letter * (size // len(letter.encode()))
    result = sh.exec(f"cat <<'END' | wc -c\n{text}\nEND")
    assert int(result.stdout) == len(text.encode()) + 1


def test_a_long_command_still_has_empty_stdin_and_its_exit_code(sh):
    """However a long command travels, what it sees is the same."""
    result = sh.exec(f": {'x' * 200_000}\ncat; echo $0 $#; exit 4", check=False)
    assert (result.exit_code, result.stdout.split()[-1]) == (4, "0")


@pytest.mark.parametrize(
    "value",
    [
        "",
        NASTY,
        "two\nlines\n\n",
        "\n",
        " spaces ",
        "100%d %b \\0101 \\",
        "''\"\"",
        "é☃𝄞",
        "\\",
        "x" * 100_000,
        "☃\n'" * 20_000,
    ],
    ids=lambda value: repr(value[:8]) + str(len(value)),
)
def test_environment_values_arrive_verbatim(sh, value):
    """A variable's value is what the caller gave, byte for byte."""
    result = sh.exec('printf %s "$VALUE"', env={"VALUE": value})
    assert result.stdout == value


@pytest.mark.parametrize(
    "name", ["cmd", "line", "x", "code", "guard", "ended", "folder", "root", "IFS", "A", "_b", "PS1", "OPTIND1"]
)
def test_no_name_of_a_variable_is_taken(sh, name):
    """How commands are run uses no variable that a caller's could collide with."""
    if name == "IFS":  # every shell sets its own
        assert sh.exec("echo a1b", env={"IFS": "1234567890"}).stdout == "a1b\n"
    else:
        assert sh.exec("env", env={name: "mine"}).stdout.splitlines().count(f"{name}=mine") == 1


def test_nothing_of_the_machinery_shows_in_the_environment(sh):
    """A command sees only what it is supposed to see, and the mark by which a helper knows its family."""
    names = {line.partition("=")[0] for line in sh.exec("env", env={"MINE": "1"}).stdout.splitlines()}
    odd = {name for name in names if name.islower() or "pool" in name.lower()}
    assert odd == set()


def test_variables_of_one_call_are_gone_in_the_next(sh):
    """The environment of a call is that call's."""
    sh.exec("true", env={"ONCE": "1"})
    assert sh.exec('echo "${ONCE-unset}"').stdout == "unset\n"


def test_the_environment_of_the_backend_is_under_that_of_the_call(rig):
    """The backend's variables are in every command; a call's win."""
    backend = rig.backend(env={"A": "backend", "B": "backend"})
    assert backend.exec('echo "$A $B"', env={"B": "call"}).stdout == "backend call\n"


def test_the_workers_own_environment_does_not_leak(shell, monkeypatch):
    """A worker's variables hold its secrets: no command sees them."""
    monkeypatch.setenv("WORKER_SECRET", "hush")
    assert "hush" not in shell.backend().exec("env").stdout


def test_a_usable_path_and_home_are_there(sh):
    """Programs are found, and HOME is set."""
    assert sh.exec('command -v ls >/dev/null && test -n "$HOME" && echo yes').stdout == "yes\n"


@pytest.mark.parametrize("env", [{"A B": "x"}, {"1A": "x"}, {"": "x"}, {"A=": "x"}, {"A": 1}, {"A": "a\0b"}, {1: "x"}])
def test_a_bad_variable_is_refused_without_showing_its_value(backend, env):
    """What cannot be a variable is a ConfigError before anything runs."""
    with pytest.raises(ConfigError, match="env"):
        backend.exec("touch ran", env=env)
    assert not backend.exists("ran")


@pytest.mark.parametrize("command", ["", "  \n", None, 7, ["ls"], b"ls", "echo \0"])
def test_a_bad_command_is_refused(backend, command):
    """What is no command is a ConfigError before anything runs."""
    with pytest.raises(ConfigError, match="command"):
        backend.exec(command)


@pytest.mark.parametrize("timeout", [0, -1, "5", True, float("nan")])
def test_a_bad_timeout_is_refused(backend, timeout):
    """A timeout is a number of seconds above zero, or None."""
    with pytest.raises(ConfigError, match="timeout"):
        backend.exec("touch ran", timeout=timeout)


def test_a_bad_encoding_is_refused_before_the_command_runs(backend):
    """An encoding nobody knows is a ConfigError, not a surprise after the work is done."""
    backend.mkdir(".")
    with pytest.raises(ConfigError, match="encoding"):
        backend.exec("touch ran", encoding="utf-nine")
    with pytest.raises(ConfigError, match="encoding"):
        backend.exec("touch ran", encoding="utf-nine", on_output=lambda *_: None)
    assert not backend.exists("ran")


def test_a_lone_surrogate_is_refused_or_arrives_as_its_byte(sh):
    """Text that is no text harms nobody: undecodable bytes pass, other surrogates are a ConfigError."""
    for _ in range(12):  # more than there are channels
        with pytest.raises(ConfigError, match="surrogate"):
            sh.exec("echo '\ud800'")
        with pytest.raises(ConfigError, match="surrogate"):
            sh.exec("true", env={"A": "\ud800"})
    assert sh.exec("printf '%s' '\udcff'", encoding=None).stdout == b"\xff"
    assert sh.exec('printf %s "$A"', env={"A": "\udcff"}, encoding=None).stdout == b"\xff"


def test_stdin_is_empty(sh):
    """A command that reads its input sees the end of it at once, also with variables set."""
    assert sh.exec("cat; echo end").stdout == "end\n"
    assert sh.exec("cat; echo end", env={"A": "x"}).stdout == "end\n"


ALL_BYTES = bytes(range(256))


@pytest.mark.parametrize(
    "stdin",
    ["text é\n", ALL_BYTES, "no line end", "\n", b"", ALL_BYTES * 256, ALL_BYTES * 257, ALL_BYTES * (10 << 12)],
    ids=["text", "bytes", "a-word", "newline", "nothing", "64K", "64K-and-a-bit", "10M"],
)
def test_a_command_reads_what_it_is_given(sh, stdin):
    """All of it, and then the end; whatever else the command is given."""
    content = stdin.encode() if isinstance(stdin, str) else stdin
    want = hashlib.sha256(content).hexdigest()
    assert sh.exec("sha256sum; cat", stdin=stdin).stdout == f"{want}  -\n"
    long = sh.exec(f": {'x' * 200_000}; cd /; [ $A = 1 ] && sha256sum", stdin=stdin, env={"A": "1", "PATH": PATH})
    assert long.stdout == f"{want}  -\n"


def test_a_command_need_not_read_what_it_is_given(sh):
    """Nor all of it; the next one is given what is its own."""
    big = b"x" * 3_000_000
    assert sh.exec("echo done", stdin=big).stdout == "done\n"
    assert sh.exec("head -c 3", stdin=b"one" + big).stdout == "one"
    assert sh.exec("exec <&-; echo closed", stdin=big).stdout == "closed\n"
    assert sh.exec("cat; echo", stdin="two").stdout == "two\n"
    assert sh.exec("cat; echo none").stdout == "none\n"


def test_stdin_is_written_in_the_encoding_of_the_output(sh):
    """As `subprocess.run` has it."""
    result = sh.exec("cat; od -An -tx1 <&0", stdin="é", encoding="latin-1")
    assert result.stdout == "é"
    assert sh.exec("od -An -tx1", stdin="é", encoding="latin-1").stdout.split() == ["e9"]
    assert sh.exec("od -An -tx1", stdin="é", encoding=None).stdout.split() == [b"c3", b"a9"]


def test_many_commands_at_once_read_each_its_own(shell):
    """However long the others' is."""
    backend = shell.backend()
    backend.exec("true")
    with ThreadPoolExecutor(20) as threads:
        contents = [str(n).encode() * (100_000 if n % 5 == 0 else 1) for n in range(20)]
        runs = list(threads.map(lambda content: backend.exec("cat", stdin=content, encoding=None).stdout, contents))
    assert runs == contents


def test_a_timeout_and_a_cancel_end_a_command_that_has_much_to_read(shell, sh, run):
    """At any moment of it."""
    sh.exec("true")
    big = bytes(20 << 20)

    async def cancelled(after):
        call = asyncio.create_task(sh.aexec("echo $$ > pid; sleep 1000", stdin=big))
        await asyncio.sleep(after)
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled()

    for after in (0, 0.01, 0.05, 0.2):
        run(cancelled(after))
    with pytest.raises(CommandTimeout):
        sh.exec("echo $$ > pid; sleep 1000", stdin=big, timeout=1.5)
    if has_pid(shell.root / "pid"):
        wait_gone(wait_pid(shell.root / "pid"))
    assert sh.exec("cat", stdin="usable").stdout == "usable"


@pytest.mark.parametrize("shell", ["local"], indirect=True)
def test_what_came_of_its_stdin_is_not_left_when_it_is_cancelled(shell, monkeypatch, tmp_path):
    """Neither is the command started."""
    (folder := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    backend = shell.backend()

    async def cancelled():
        call = asyncio.create_task(backend.aexec("touch ran", stdin=bytes(60 << 20)))
        while not any(file.stat().st_size for file in folder.iterdir()):
            await asyncio.sleep(0)
            assert not call.done()
        call.cancel()
        await asyncio.wait({call})

    for _ in range(3):
        loop_thread().run(cancelled())
        assert list(folder.iterdir()) == []
    assert not (shell.root / "ran").exists()


@pytest.mark.parametrize(
    ("shell", "after"),
    [*((kind, 0.02) for kind in ("local", "loopback")), ("loopback-channel", 0.2),
     pytest.param("openssh", 0.02, marks=pytest.mark.openssh),
     pytest.param("openssh-channel", 0.2, marks=pytest.mark.openssh)],
    indirect=["shell"],
)  # fmt: skip
def test_a_command_that_is_cancelled_before_it_was_given_all_never_starts(shell, sh, after):
    """Whatever part of it is on its way (over a channel all of it takes some 1.2 s); the next one runs."""
    sh.exec("true")

    async def cancelled():
        call = asyncio.create_task(sh.aexec("touch ran", stdin=bytes(60 << 20)))
        await asyncio.sleep(after)
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled()

    for _ in range(3):
        loop_thread().run(cancelled())
        assert sh.exec("cat", stdin="usable").stdout == "usable"
    assert not (shell.root / "ran").exists()


@pytest.mark.parametrize("shell", ["local"], indirect=True)
def test_no_room_for_what_it_is_to_read_is_told_and_nothing_runs(shell, monkeypatch):
    """The host's temporary folder is gone, or full."""
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    backend = shell.backend()
    with pytest.raises(FileOperationFailed, match="stdin of 'the command': there is no room for it"):
        backend.exec("touch ran", stdin="x" * 1_000_000)
    assert backend.exec("ls").stdout == ""


@pytest.mark.parametrize(
    ("stdin", "text"),
    [(5, "not int"), (["a"], "not list"), ("\ud800", "stdin: cannot be written in utf-8")],
)
def test_a_bad_stdin_is_refused(backend, stdin, text):
    """With what is wrong about it."""
    with pytest.raises(ConfigError, match=text):
        backend.exec("echo ran", stdin=stdin)


def test_more_than_may_be_given_is_refused(backend, monkeypatch):
    """A command that is to read more is to read a file."""
    monkeypatch.setattr("pool.backends.shell.MAX_STDIN", 10)
    with pytest.raises(ConfigError, match="stdin: has 11 bytes, at most 10"):
        backend.exec("echo ran", stdin="x" * 11)


def test_cwd_is_the_root_unless_told(shell, sh):
    """Commands start in the root, or in a folder below it."""
    sh.mkdir("a/b c")
    root = os.path.realpath(shell.root)
    assert sh.exec("pwd -P").stdout.strip() == root
    assert sh.exec("pwd -P", cwd="a").stdout.strip() == f"{root}/a"
    assert sh.exec("pwd -P", cwd="a/b c").stdout.strip() == f"{root}/a/b c"
    assert sh.exec("pwd -P", cwd="/a").stdout.strip() == f"{root}/a"
    assert sh.exec("pwd -P", cwd=f"{root}/a").stdout.strip() == f"{root}/a"
    assert sh.exec("pwd -P", cwd="a/../a/./b c/").stdout.strip() == f"{root}/a/b c"


@pytest.mark.parametrize("name", ["-P", "-", "new\nline", "sp ace", "a'b", "$HOME", "é☃", "*", "~"])
def test_cwd_may_have_a_strange_name(shell, sh, name):
    """No letter in the name of a folder means anything."""
    sh.mkdir(name)
    assert sh.exec("pwd -P", cwd=name).stdout == f"{os.path.realpath(shell.root)}/{name}\n"


def test_a_missing_cwd_is_a_missing_file(backend):
    """The command is not run somewhere else instead."""
    with pytest.raises(FileMissing, match="nowhere"):
        backend.exec("true", cwd="nowhere")
    with pytest.raises(FileMissing, match="nowhere"):
        backend.exec("true", cwd="nowhere", env={"A": "1"}, check=False)


def test_who_follows_a_command_sees_nothing_of_the_script_around_it(backend):
    """Its word about a missing folder is an exception, and no output."""
    pieces = []
    with pytest.raises(FileMissing):
        backend.exec("pwd", cwd="nowhere", on_output=lambda *piece: pieces.append(piece))
    assert pieces == []


@pytest.mark.parametrize("cwd", ["..", "../outside", "a/../../outside", "/.."])
def test_cwd_does_not_leave_the_root_by_dots(backend, cwd):
    """An escape is refused, not cut off."""
    with pytest.raises(PathEscapeError):
        backend.exec("true", cwd=cwd)


def test_cwd_does_not_leave_the_root_by_a_symlink(shell, sh):
    """A symlink to the outside is no way out, also not in the middle of a path; one inside the root works."""
    sh.exec(f"ln -s '{shell.outside}' out; mkdir in; ln -s in link; ln -s .. up")
    for cwd in ("out", "up", "up/outside", "in/../out"):
        with pytest.raises(PathEscapeError):
            sh.exec("touch ran", cwd=cwd)
    assert not (shell.outside / "ran").exists()
    assert sh.exec("pwd -P", cwd="link").stdout.strip().endswith("/in")


def test_a_root_whose_name_another_begins_with_is_no_way_out(shell, sh):
    """/root2 is not under /root."""
    sh.exec(f"mkdir '{shell.root}2'; ln -s '{shell.root}2' twin")
    with pytest.raises(PathEscapeError):
        sh.exec("true", cwd="twin")


def test_commands_from_many_threads_share_the_channels(shell):
    """More commands at once than channels: those without one wait, and every answer finds its caller."""
    backend = shell.backend()
    backend.exec("true")
    before = shell.logins()
    start = threading.Barrier(30)

    def one(number):
        start.wait(30)
        return backend.exec(f"sleep 0.05; echo {number}").stdout

    with ThreadPoolExecutor(30) as threads:
        assert list(threads.map(one, range(30))) == [f"{number}\n" for number in range(30)]
    assert shell.logins() == before


@pytest.mark.parametrize("remote", CHANNELS, indirect=True)
def test_commands_that_wait_for_a_channel_run_in_the_order_they_came(remote):
    """With one channel the commands run one after the other, first come first served."""
    backend = remote.backend(max_channels=1)
    backend.exec("true")

    async def all_at_once():
        import asyncio

        await asyncio.gather(*(asyncio.create_task(backend.aexec(f"echo {n} >> order")) for n in range(12)))

    loop_thread().run(all_at_once())
    assert backend.read("order").split() == [str(n) for n in range(12)]
