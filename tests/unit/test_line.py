"""The line to the process that has the backends, and the board on which it posts what it knows."""

import os
import select
import threading

import pytest

from pool.errors import PoolError
from pool.worker.board import Board
from pool.worker.line import LONGEST, Line
from tests.support.waiting import wait_until


@pytest.fixture
def line():
    line = Line()
    yield line
    line.close()


@pytest.fixture
def board():
    board = Board()
    yield board
    board.close()


def test_messages_are_heard_in_order_on_the_event_loop(line):
    """Each with what it needs; one that fails does not end the line."""
    heard = []

    def hear(n):
        heard.append((n, threading.current_thread().name))
        if n == 1:
            raise ValueError("this one fails")

    call = line.listen({"say": hear})
    for n in range(3):
        line.say("say", n=n)
    line.say("unknown")
    line.say("say", n=3)
    wait_until(lambda: len(heard) == 4, "all are heard")
    assert [n for n, _ in heard] == [0, 1, 2, 3]
    assert {thread for _, thread in heard} == {"backend-pool-loop"}
    call.abandon()


def test_a_listener_that_is_killed_leaves_no_half_message(line):
    """The next one hears what comes, from its beginning."""
    child = os.fork()
    if not child:
        select.select([line._ear], [], [])
        line._ear.recv(3)  # as much as it got
        os._exit(0)
    line.say("say", n=1)
    os.waitpid(child, 0)
    heard = []
    call = line.listen({"say": lambda n: heard.insert(0, n)})
    line.say("say", n=2)
    wait_until(lambda: heard == [2], "the second is heard")
    call.abandon()


def test_nobody_listens(line):
    """A message is refused with the reason when there is no room; waking is never refused."""
    with pytest.raises(PoolError, match="does not listen"):
        for _ in range(100_000):
            line.say("say", n=1)
    line.wake()


def test_a_message_has_its_bounds(line):
    """Nothing is cut."""
    with pytest.raises(PoolError, match=f"at most {LONGEST}"):
        line.say("say", text="x" * LONGEST)


def test_the_board_shows_what_was_posted_last(board):
    """Longer or shorter than before."""
    assert board.read() is None
    for content in (b"long" * 1000, b"short", b""):
        board.post(content)
        assert board.read() == content


def test_a_child_posts_and_its_parent_reads(board):
    """Also after the child was killed."""
    child = os.fork()
    if not child:
        board.post(b"from the child")
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert board.read() == b"from the child"


def test_half_a_post_is_none(board):
    """Its writer was killed at it."""
    board.post(b"whole and well")
    os.pwrite(board._file.fileno(), b"!", 10)
    assert board.read() is None


def test_a_reader_beside_a_writer_sees_whole_posts_only(board):
    """However they meet."""
    stop = threading.Event()

    def write():
        n = 0
        while not stop.is_set():
            n += 1
            board.post(bytes([n % 256]) * (1 + n % 5000))

    board.post(b"\1")
    writer = threading.Thread(target=write)
    writer.start()
    seen = [board.read() for _ in range(3000)]
    stop.set()
    writer.join()
    assert all(content is None or len(set(content)) == 1 for content in seen)
    assert sum(content is not None for content in seen) > 100
