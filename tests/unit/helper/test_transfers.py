"""The helper as a process: file operations, many at once, given up, cut off."""

import errno
import os
import random
import threading

import psutil
import pytest

from pool.helper import transfers, wire
from pool.helper.bundle import bundle
from tests.support.helper_program import Program
from tests.support.waiting import wait_until

BIG = random.Random(1).randbytes(10 << 20)


@pytest.fixture
def program():
    with Program() as program:
        yield program


def write(program, path, root, data):
    number = program.file("write", path, root)
    program.feed(number, data)
    return program.wait(number)


def test_all_operations(program, tmp_path):
    """Each does to the disk what its name says, and answers with what there is to know."""
    file = tmp_path / "folder" / "file"
    assert write(program, file, tmp_path, b"content").kind == wire.DONE
    assert file.read_bytes() == b"content"
    assert program.operate("read", file, tmp_path).content == b"content"
    size, mtime, mode = program.operate("stat", file, tmp_path).payload.split()
    status = file.stat()
    assert (int(size), int(mode)) == (7, status.st_mode)
    assert abs(float(mtime) - status.st_mtime) < 1e-3
    assert program.operate("mkdir", tmp_path / "a" / "b", tmp_path).kind == wire.DONE
    assert program.operate("touch", tmp_path / "a" / "t", tmp_path).kind == wire.DONE
    assert sorted(program.operate("readdir", tmp_path / "a", tmp_path).payload.split(b"\0")) == [b"b", b"t"]
    assert program.operate("rename", "2", file, tmp_path, tmp_path / "a" / "f", tmp_path).kind == wire.DONE
    assert (tmp_path / "a" / "f").read_bytes() == b"content"
    assert program.operate("rm", "0", tmp_path / "a" / "b", tmp_path).kind == wire.DONE
    assert program.operate("rm", "0", tmp_path / "a", tmp_path).failure[:2] == [b"os", b"%d" % errno.ENOTEMPTY]
    assert program.operate("rm", "1", tmp_path / "a", tmp_path).kind == wire.DONE
    assert os.listdir(tmp_path) == ["folder"]
    assert program.operate("readdir", tmp_path / "folder", tmp_path).payload == b""


def test_ten_megabytes_each_way(program, tmp_path):
    """Byte for byte, against credit."""
    assert write(program, tmp_path / "big", tmp_path, BIG).kind == wire.DONE
    assert (tmp_path / "big").read_bytes() == BIG
    assert program.operate("read", tmp_path / "big", tmp_path).content == BIG


def test_many_at_once(program, tmp_path):
    """More than are done at a time, in any order of their ends, commands in between."""
    numbers = []
    for index in range(50):
        number = program.file("write", tmp_path / f"f{index}", tmp_path)
        program.send(wire.INPUT, number, b"%d" % index)
        numbers.append(number)
    assert program.run("echo meanwhile").out == b"meanwhile\n"
    for number in reversed(numbers):
        program.send(wire.INPUT, number)
    assert {program.wait(number).kind for number in numbers} == {wire.DONE}
    reads = [program.file("read", tmp_path / f"f{index}", tmp_path) for index in range(50)]
    assert [program.wait(number).content for number in reads] == [b"%d" % index for index in range(50)]


def test_a_reader_without_credit_holds_nobody_up(program, tmp_path):
    """A file of which nobody takes the content is read as far as its window goes; others are served."""
    (tmp_path / "big").write_bytes(BIG)
    (tmp_path / "small").write_bytes(b"x")
    program.credit = False
    number = program.file("read", tmp_path / "big", tmp_path)
    while len(program.calls[number].out) < wire.WINDOW:
        program.pump()
    for _ in range(10):
        assert program.operate("read", tmp_path / "small", tmp_path).content == b"x"
    assert len(program.calls[number].out) == wire.WINDOW
    program.credit = True
    program.send(wire.CREDIT, number, wire.COUNT.pack(wire.WINDOW))
    assert program.wait(number).content == BIG


def test_a_write_that_is_given_up_leaves_nothing(program, tmp_path):
    """No temporary file, and the old content."""
    (tmp_path / "file").write_text("old")
    numbers = [program.file("write", tmp_path / "file", tmp_path) for _ in range(8)]  # some wait for their turn
    for number in numbers:
        program.send(wire.INPUT, number, b"new")
    wait_until(lambda: len(os.listdir(tmp_path)) > 1, "one has begun")
    for number in numbers:
        program.send(wire.KILL, number)
    assert {bytes(program.wait(number).payload) for number in numbers} == {b"given up"}
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_read_that_is_given_up_ends(program, tmp_path):
    """Though it waits for credit."""
    (tmp_path / "big").write_bytes(BIG)
    program.credit = False
    number = program.file("read", tmp_path / "big", tmp_path)
    while len(program.calls[number].out) < wire.WINDOW:
        program.pump()
    program.send(wire.KILL, number)
    assert program.wait(number).failure == [b"given up"]


def test_what_is_given_up_before_its_turn_is_not_done(program, tmp_path):
    """A removal that waits for a thread and is cancelled removes nothing."""
    (tmp_path / "precious").touch()
    writes = [program.file("write", tmp_path / f"f{index}", tmp_path) for index in range(4)]
    number = program.file("rm", "0", tmp_path / "precious", tmp_path)
    program.send(wire.KILL, number)
    program.ping()
    for write in writes:
        program.send(wire.INPUT, write)
    assert program.wait(number).failure == [b"given up"]
    assert (tmp_path / "precious").exists()


def test_a_channel_that_is_closed_in_the_middle_of_a_write(program, tmp_path):
    """The helper ends, no temporary file stays, and nothing is replaced."""
    (tmp_path / "file").write_text("old")
    for index in range(6):
        number = program.file("write", tmp_path / "file", tmp_path)
        program.send(wire.INPUT, number, b"new")
    wait_until(lambda: len(os.listdir(tmp_path)) > 1, "one has begun")
    assert program.hang_up() == 0
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_pipe_has_no_content_to_wait_for(program, tmp_path):
    """Reading one fails, or finds it empty, at once."""
    os.mkfifo(tmp_path / "fifo")
    assert program.operate("read", tmp_path / "fifo", tmp_path).content == b""
    with open(os.open(tmp_path / "fifo", os.O_RDWR), "wb"):
        assert program.operate("read", tmp_path / "fifo", tmp_path).failure[:2] == [b"os", b"%d" % errno.EAGAIN]


def test_an_operation_that_hangs_does_not_keep_the_helper(tmp_path):
    """As on a dead network drive: its patience ends, and so does it, with its commands."""
    source = bundle().replace(b"return os.stat(", b"import time; time.sleep(1000); return os.stat(")
    assert source != bundle()
    with Program(source=source) as program:
        for _ in range(6):
            program.file("stat", tmp_path, tmp_path)
        assert program.run("echo meanwhile").out == b"meanwhile\n"
        assert program.hang_up() == 0


def test_a_symlink_out_of_the_root(program, tmp_path):
    """Every operation refuses it, with where it leads to."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
    (outside / "secret").write_text("secret")
    (root / "way").symlink_to(outside)
    path = root / "way" / "secret"
    for operation in ("read", "stat", "touch", "write", "readdir"):
        assert program.operate(operation, path, root).failure == [b"outside", bytes(outside / "secret")]
    assert program.operate("mkdir", root / "way" / "new", root).failure == [b"outside", bytes(outside / "new")]
    assert program.operate("rm", "1", path, root).failure == [b"outside", bytes(outside / "secret")]
    assert program.operate("rename", "2", path, root, root / "got", root).failure[0] == b"outside"
    (root / "file").touch()
    assert program.operate("rename", "2", root / "file", root, path, root).failure[0] == b"outside"
    assert (outside / "secret").read_text() == "secret"


def test_an_operation_that_there_is_not(program, tmp_path):
    """Fails alone."""
    assert program.operate("format", tmp_path, tmp_path).failure[0] == b"bug"
    assert program.run("echo on").out == b"on\n"


def test_a_helper_has_few_threads(program, tmp_path):
    """However many operations wait."""
    numbers = [program.file("write", tmp_path / f"f{index}", tmp_path) for index in range(40)]
    program.ping()
    assert psutil.Process(program.pid).num_threads() <= 5
    for number in numbers:
        program.send(wire.INPUT, number)
        program.wait(number)


def test_a_host_without_room_for_threads(monkeypatch):
    """The operation fails, and what comes later may find room."""
    answers, woken = [], threading.Event()
    served = transfers.Transfers(woken.set)

    def start(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        served.begin(1, b"stat\0/\0/")
        answers += served.take()
    assert answers == [(wire.FAILED, 1, b"os\0%d\0" % errno.EAGAIN)]
    assert served.none()
    served.begin(2, b"stat\0/\0/")
    wait_until(lambda: answers.extend(served.take()) or len(answers) == 2, "the second is done")
    assert answers[1][:2] == (wire.DONE, 2)
