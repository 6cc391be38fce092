"""What commands write: whole characters, in order, bounded, and passed on while they run."""

import threading
import time

import psutil
import pytest

from pool.errors import CommandFailed
from tests.support.processes import wait_gone, wait_pid
from tests.support.waiting import wait_until

MB = 1 << 20
ALL_BYTES = 'i=0; while [ $i -lt 256 ]; do printf "\\\\$(printf %03o $i)"; i=$((i+1)); done'


def test_all_byte_values_pass_with_encoding_none(backend):
    """Bytes are not touched, in either stream."""
    result = backend.exec(f"{ALL_BYTES}; {{ {ALL_BYTES}; }} >&2", encoding=None)
    assert (result.stdout, result.stderr) == (bytes(range(256)), bytes(range(256)))


def test_invalid_utf8_is_replaced(backend):
    """Output that is no UTF-8 is no error."""
    assert backend.exec(r"printf 'a\377\376b\303'").stdout == "a��b�"


def test_another_encoding_may_be_asked_for(backend):
    """Text is decoded as the caller says."""
    assert backend.exec(r"printf 'caf\351'", encoding="latin-1").stdout == "café"


def test_output_holds_both_streams_in_order_of_arrival(sh):
    """``output`` interleaves the streams as they came."""
    seen = "until [ -e {} ]; do sleep 0.02; done"  # before the next word
    loop = f"echo out$i; {seen.format('out$i')}; echo err$i >&2; {seen.format('err$i')}"
    result = sh.exec(f"for i in 1 2 3; do {loop}; done", on_output=lambda piece, _: sh.touch(piece.strip()))
    assert result.output == "out1\nerr1\nout2\nerr2\nout3\nerr3\n"


def test_much_output_keeps_head_and_tail(sh):
    """Of 10 MB the first and the last half megabyte are kept, and the result says so."""
    result = sh.exec("echo first; head -c 10485760 /dev/zero | tr '\\0' x; echo; echo last")
    assert result.truncated
    assert result.stdout.startswith("first\nxxx")
    assert result.stdout.endswith("xxx\nlast\n")
    assert "bytes left out" in result.stdout
    assert MB <= len(result.stdout) <= MB + 100


def test_truncated_bytes_hold_no_note(sh):
    """Binary output gets nothing inserted."""
    result = sh.exec("head -c 3145728 /dev/zero", encoding=None)
    assert (result.truncated, result.stdout == bytes(MB)) == (True, True)


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
def test_a_backend_may_keep_less(rig, limit):
    """``max_output`` bounds each stream."""
    result = rig.backend(max_output=limit).exec("echo 0123456789; echo abc >&2", encoding=None)
    kept = (
        (b"0123456789\n"[: limit - limit // 2] + b"0123456789\n"[11 - limit // 2 :]) if limit < 11 else b"0123456789\n"
    )
    assert result.stdout == kept
    assert len(result.stderr) == min(limit, 4)


def test_output_of_exactly_the_limit_is_not_truncated(rig):
    """The bound itself is still whole."""
    result = rig.backend(max_output=10).exec("printf 0123456789")
    assert (result.stdout, result.truncated) == ("0123456789", False)


def test_on_output_is_called_in_the_calling_thread_while_the_command_runs(shell):
    """A caller sees output as it comes, in its own thread, and can answer it."""
    backend = shell.backend()
    seen = []

    def on_output(piece, stream):
        seen.append((piece, stream, threading.get_ident()))
        backend.touch("go")

    backend.exec("echo ready; while [ ! -e go ]; do sleep 0.02; done; echo done >&2", on_output=on_output)
    me = threading.get_ident()
    assert seen == [("ready\n", "stdout", me), ("done\n", "stderr", me)]


def test_on_output_sees_each_stream_whole_and_in_order(sh):
    """The pieces of a stream, put together, are the stream."""
    pieces = {"stdout": [], "stderr": []}
    result = sh.exec(
        "i=0; while [ $i -lt 2000 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done",
        on_output=lambda piece, stream: pieces[stream].append(piece),
    )
    assert "".join(pieces["stdout"]) == result.stdout == "".join(f"out {n}\n" for n in range(2000))
    assert "".join(pieces["stderr"]) == result.stderr == "".join(f"err {n}\n" for n in range(2000))


def test_on_output_gets_a_character_that_was_cut_as_a_whole(sh):
    """Bytes of one character that arrive apart are passed on together; a rest that is none is replaced."""
    pieces = []
    sh.exec(
        r"printf 'a\342'; sleep 0.2; printf '\230'; sleep 0.2; printf '\203b'; sleep 0.2; printf '\303'",
        on_output=lambda piece, _stream: pieces.append(piece),
    )
    assert "".join(pieces) == "a☃b�"
    assert all(piece for piece in pieces)


def test_on_output_gets_the_rest_of_a_failed_command_too(sh):
    """What a failing command wrote last is not lost."""
    pieces = []
    with pytest.raises(CommandFailed):
        sh.exec(r"printf 'a\303'; exit 1", on_output=lambda piece, _stream: pieces.append(piece))
    assert "".join(pieces) == "a�"


def test_on_output_gets_bytes_with_encoding_none(sh):
    """Bytes in, bytes out."""
    pieces = []
    sh.exec(ALL_BYTES, on_output=lambda piece, _stream: pieces.append(piece), encoding=None)
    assert b"".join(pieces) == bytes(range(256))


@pytest.mark.parametrize(
    "command", ["sleep 1000", "yes", "yes & yes >&2", "trap '' TERM; yes", "trap '' TERM; while :; do sleep 1; done"]
)
def test_an_exception_in_on_output_ends_the_command(shell, sh, command):
    """The caller's exception comes back as it is, and the process is gone by then."""

    class Enough(Exception):
        pass

    def on_output(_piece, _stream):
        raise Enough

    with pytest.raises(Enough):
        sh.exec(f"echo $$ > pid; echo go; {command}", on_output=on_output)
    wait_gone(wait_pid(shell.root / "pid"))
    assert sh.exec("echo on").stdout == "on\n"


def test_slow_on_output_loses_nothing(sh):
    """10 MB reach a slow reader completely, although less than that is kept."""
    sizes = {"stdout": 0, "stderr": 0}

    def on_output(piece, stream):
        sizes[stream] += len(piece)
        time.sleep(0.0002)  # this is the slowness itself

    result = sh.exec(
        "head -c 10485760 /dev/zero; head -c 10000 /dev/zero >&2; exit 0", on_output=on_output, encoding=None
    )
    assert sizes == {"stdout": 10 * MB, "stderr": 10_000}
    assert (len(result.stdout), result.truncated) == (MB, True)


def test_slow_on_output_with_both_streams_full_at_once(sh):
    """Two streams that both have to wait both go on again."""
    sizes = {"stdout": 0, "stderr": 0}

    def on_output(piece, stream):
        sizes[stream] += len(piece)
        time.sleep(0.0005)

    sh.exec(
        "head -c 6291456 /dev/zero & head -c 6291456 /dev/zero >&2; wait",
        on_output=on_output,
        encoding=None,
        timeout=60,
    )
    assert sizes == {"stdout": 6 * MB, "stderr": 6 * MB}


def test_on_output_that_stands_still_makes_the_command_wait(shell, sh):
    """What waits for a reader is bounded, so a fast command cannot fill the worker's memory."""
    command = "i=0; while [ $i -lt 1000 ]; do head -c 65536 /dev/zero; i=$((i+1)); echo $i > progress; done"
    blocked, go_on = threading.Event(), threading.Event()
    total = [0]

    def on_output(piece, _stream):
        total[0] += len(piece)
        blocked.set()
        go_on.wait(100)

    thread = threading.Thread(target=lambda: sh.exec(command, on_output=on_output, encoding=None))
    thread.start()
    try:
        assert blocked.wait(30)
        last = [None] * 30

        def stands_still():
            file = shell.root / "progress"
            last.append(file.read_text() if file.exists() else None)
            return last[-1] and len(set(last[-30:])) == 1

        wait_until(stands_still, "the command waits", 60)
        assert int(last[-1]) * 65536 < 16 * MB
    finally:
        go_on.set()
        thread.join(60)
    assert total[0] == 1000 * 65536


def test_a_daemon_with_its_output_elsewhere_does_not_hold_exec_up(shell, sh):
    """What goes to the background and lets go of the output lives on, after exec and after destroy."""
    sh.exec("sleep 1000 >/dev/null 2>&1 & echo $! > plain; setsid sleep 1000 >/dev/null 2>&1 & echo $! > own; exit 0")
    daemons = [wait_pid(shell.root / name) for name in ("plain", "own")]
    try:
        assert sh.exec("echo next").stdout == "next\n"
        sh.destroy()
        assert all(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in daemons)
    finally:
        for pid in daemons:
            psutil.Process(pid).kill()


def test_a_shell_killed_by_a_signal_leaves_no_talk_of_ours(sh):
    """What our own shell has to say about the end of a command is not the command's output."""
    assert sh.exec("kill -9 $$", check=False).stderr == ""


def test_output_that_a_background_process_writes_later_is_waited_for(sh):
    """Exec ends when the output is closed, not when the shell exits."""
    late = "while kill -0 $$ 2>/dev/null; do sleep 0.05; done; echo late"  # $$ is the shell's
    assert sh.exec(f"({late}) & echo early").stdout == "early\nlate\n"
