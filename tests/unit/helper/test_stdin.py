"""What a command is given to read, at the helper."""

import os

import pytest

from pool.helper import wire
from pool.helper.commands import Stdin
from tests.support.helper_program import Program

PIECE = b"x" * wire.CHUNK


@pytest.fixture
def program():
    with Program() as program:
        yield program


def descriptors(program):
    return len(os.listdir(f"/proc/{program.pid}/fd"))


@pytest.mark.parametrize(
    "pieces", [[b"a"], [b"a", b"", b"b"], [PIECE], [PIECE] * 40], ids=["one", "two", "64K", "2.5M"]
)
def test_a_command_reads_what_came_before_it(program, pieces):
    """From the first byte to the last, and the next command nothing of it."""
    program.give(*pieces)
    assert program.run("cat").out == b"".join(pieces)
    assert program.run("cat; echo none").out == b"none\n"


def test_what_there_is_no_room_for_is_forgotten_in_silence():
    """Its buffer is written once more when it is closed; an error there would end everything that the helper runs."""
    stdin = Stdin()
    stdin.close()
    stdin._file = open("/dev/full", "wb")
    stdin.add(b"x" * 100)
    with pytest.raises(OSError, match="No space"):
        stdin._file.flush()
    stdin.close()
    assert stdin._file.closed


def test_credit_is_given_for_what_was_taken(program):
    """So that the worker can send more than a window before the command; not for each little piece."""
    program.give(*[PIECE] * 32)
    assert program.run("true").granted == wire.WINDOW
    program.give(b"short")
    assert program.run("true").granted == 0


def test_a_command_that_never_comes_leaves_nothing(program):
    """Its call is ended as one that was killed."""
    before = descriptors(program)
    number = program.give(*[PIECE] * 4)
    program.send(wire.KILL, number)
    assert program.wait(number).code == 128 + 15
    assert descriptors(program) == before


@pytest.mark.parametrize("pieces", [[b"a"], [PIECE] * 4])
def test_nothing_of_it_stays(program, pieces):
    """Neither with the helper nor with the command, whatever becomes of that."""
    before = descriptors(program)
    for command, folder in [("true", "/"), ("exit 3", "/"), ("true", "/no/such/folder")] * 5:
        program.give(*pieces)
        program.run(command, [folder])
    assert descriptors(program) == before
    program.give(*pieces)
    assert program.run("ls /proc/self/fd").out.split() == [b"0", b"1", b"2", b"3"]


def test_no_room_for_it_on_the_disk_is_told_and_nothing_runs(tmp_path):
    """With the system's reason."""
    with Program(limit_size=200) as program:
        program.give(*[PIECE] * 4)
        assert program.run(f"touch {tmp_path}/ran").failure == [b"stdin", b"27"]  # EFBIG, as the limit has it
        program.give(b"short")
        assert program.run("cat").out == b"short"
    assert not (tmp_path / "ran").exists()


def test_commands_wait_for_descriptors_with_what_they_are_to_read():
    """As others do; each gets its own."""
    with Program(limit_files=40) as program:
        numbers = []
        for n in range(60):
            program.give(b"%d" % n)
            numbers.append(program.exec("cat; sleep 0.05"))
        assert [program.wait(number).out for number in numbers] == [b"%d" % n for n in range(60)]
