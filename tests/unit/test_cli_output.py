"""Showing live output: to a file as it is, to a terminal so that it cannot act."""

import io
import sys

import pytest

from pool.cli.output import KEPT, Kept, Output
from pool.cli.screen import Screen
from pool.live.format import Piece


class Stream(io.TextIOWrapper):
    def __init__(self, terminal):
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    @property
    def bytes(self):
        return self.buffer.getvalue()


@pytest.fixture
def streams(monkeypatch):
    def streams(terminal):
        out, err = Stream(terminal), Stream(terminal)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setenv("TERM", "dumb")
        return out, err

    return streams


NASTY = b"\x1b[31m\xff\xc3\xa4\x00\r\n"


def test_a_file_gets_each_byte_as_it_was_written(streams):
    """Of each stream its own."""
    out, err = streams(terminal=False)
    output = Output(Screen())
    output.write(Piece("stdout", NASTY, 0))
    output.write(Piece("stderr", b"oops\n", 0))
    output.write(Piece("update", b"said", 0))
    assert (out.bytes, err.bytes) == (NASTY + b"said", b"oops\n")


def test_a_terminal_gets_nothing_that_acts(streams):
    """And letters that two pieces share are whole."""
    out, _ = streams(terminal=True)
    output = Output(Screen())
    for piece in (b"\x1b[31m\xc3", b"\xa4\n", b"\xff\n"):
        output.write(Piece("stdout", piece, 0))
    assert out.bytes.decode() == "^[[31m\u00e4\n\ufffd\n"


def test_raw_passes_all_through(streams):
    """Who wants colours asks for them."""
    out, _ = streams(terminal=True)
    Output(Screen(), raw=True).write(Piece("stdout", NASTY, 0))
    assert out.bytes == NASTY


def test_a_gap_is_told_on_stderr(streams):
    """Before what follows it."""
    out, err = streams(terminal=False)
    Output(Screen()).write(Piece("stdout", b"end", 12348, 12345))
    assert (out.bytes, err.bytes) == (b"end", b"... 12,345 bytes left out ...\n")


def test_json_keeps_the_end_of_each_stream():
    """And says how much is missing."""
    kept = Kept()
    kept.add(Piece("stdout", b"a" * KEPT, 0))
    kept.add(Piece("stdout", b"bb", KEPT + 3, 3))
    kept.add(Piece("stderr", b"\xff", 0))
    told = kept.told()
    assert told["stdout"] == "a" * (KEPT - 2) + "bb"
    assert (told["stderr"], told["left_out"]) == ("\ufffd", 5)
