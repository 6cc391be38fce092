"""Messages on lines: how bytes become messages, and when a line is too much."""

import asyncio
import json

import pytest

from pool.backends.acp_wire import LineTransport

LOG = b"a log line\n"


class Pipe:
    """A process that writes *chunks*, then ends; it keeps what it is sent."""

    def __init__(self, *chunks):
        self.chunks = list(chunks)
        self.sent = []

    async def receive(self):
        return self.chunks.pop(0) if self.chunks else b""

    async def send(self, data):
        await asyncio.sleep(0)
        self.sent.append(data)


def transport(*chunks, max_line=1000, full=lambda resume: False):
    ends = []
    made = LineTransport(Pipe(*chunks), max_line, full, lambda: ends.append(1))
    made.ends = ends
    return made


def messages(made):
    """All that it receives, until the end."""

    async def main():
        found = []
        while (message := await made.receive()) is not None:
            found.append(message)
        return found

    return asyncio.run(main())


def line(**message):
    return json.dumps(message).encode() + b"\n"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_messages_come_whole_however_they_are_cut(size):
    """Also in the middle of a character, and with empty lines between them."""
    sent = [{"method": "a", "params": "ü"}, {"id": 1, "result": None}, {"id": None, "error": {}}, {"id": "x"}]
    data = b"\n \n" + b"\n".join(json.dumps(message, ensure_ascii=False).encode() for message in sent) + b"\r\n"
    made = transport(*(data[at : at + size] for at in range(0, len(data), size)))
    assert messages(made) == sent
    assert (made.fault, made.garbage, made.ends) == ("", "", [1])


@pytest.mark.parametrize(
    "garbage",
    [
        b"text",
        b'"text"',
        b"12",
        b"[]",
        b"{}",
        b'{"result": 1}',
        b"\xff\xfe",
        b'{"method": 1}',
        b'{"method": {}, "id": 1}',
        b'{"id": [1], "result": 1}',
        b'{"id": {}, "method": "a"}',
        b'{"id": 1, "error": 5}',
        b'{"id": 1',
        b"1" * 900,
    ],
)
def test_a_line_that_is_no_message_is_passed_over(garbage):
    """What comes after it is heard, and the line is kept for whoever wonders."""
    made = transport(garbage + b"\n" + line(id=1))
    assert messages(made) == [{"id": 1}]
    assert made.fault == ""
    assert made.garbage == garbage.decode(errors="replace") + "\n"


def test_nesting_without_end_is_no_message():
    """Python's parser gives up in an error of its own."""
    made = transport(b'{"method": ' + b"[" * 100_000 + b"\n" + line(id=1), max_line=1 << 20)
    assert messages(made) == [{"id": 1}]


def test_a_thousand_lines_that_are_no_messages_are_forgiven():
    """One more is not: then it speaks no ACP."""
    made = transport(LOG * 1000, line(id=1))
    assert messages(made) == [{"id": 1}]
    made = transport(LOG * 1000, LOG, line(id=1))
    assert messages(made) == []
    assert made.fault == "it wrote 1001 lines that are no messages, such as: " + made.garbage[:200]
    assert "a log line" in made.fault
    assert made.ends == [1]


def test_what_is_kept_of_garbage_is_bounded():
    """However long the lines are."""
    made = transport(*[b"x" * 900 + b"\n"] * 500)
    assert messages(made) == []
    assert len(made.garbage) < 5000


@pytest.mark.parametrize("cut", [1, 300, 5000])
def test_a_line_that_is_too_long_is_the_end(cut):
    """Whether its end ever comes or not, and in whatever pieces."""
    for data in (line(id=1, result="x" * 1000), b"x" * 5000):
        made = transport(*(data[at : at + cut] for at in range(0, len(data), cut)), line(id=2))
        assert messages(made) == []
        assert "it wrote a line of" in made.fault
        assert "1000" in made.fault
        assert made.ends == [1]


def test_a_line_that_never_ends_is_the_end_before_it_fills_the_memory():
    """No newline is waited for."""
    made = transport(*[b"x" * 100] * 50)
    assert messages(made) == []
    assert made.fault == "it wrote a line of more than 1000 bytes"
    assert len(made._process.chunks) == 50 - 11


def test_a_line_of_just_the_length_is_heard():
    """The bound itself is inside."""
    data = line(id=1, result="x" * 100)
    made = transport(data, max_line=len(data) - 1)
    assert len(messages(made)) == 1
    made = transport(data, max_line=len(data) - 2)
    assert messages(made) == []


def test_a_message_without_its_newline_is_not_heard():
    """It was cut off: nobody knows what else it would have said."""
    assert messages(transport(line(id=1) + b'{"id": 2}')) == [{"id": 1}]


def test_nothing_is_read_while_the_follower_is_full():
    """And it goes on when there is room."""
    waiting = []

    def full(resume):
        waiting.append(resume)
        return len(waiting) < 3

    made = transport(line(id=1), full=full)

    async def main():
        receiving = asyncio.ensure_future(made.receive())
        for count in (1, 2):
            while len(waiting) < count:
                await asyncio.sleep(0)
            assert len(made._process.chunks) == 1
            waiting[-1]()
        return await receiving

    assert asyncio.run(main()) == {"id": 1}


def test_messages_that_are_sent_at_a_time_do_not_mix():
    """Each is one line, whatever it holds."""
    made = transport()

    async def main():
        await asyncio.gather(*(made.send({"id": number, "text": "a\nb\u2028\ud800"}) for number in range(5)))

    asyncio.run(main())
    assert [json.loads(data) for data in made._process.sent] == [
        {"id": n, "text": "a\nb\u2028\ud800"} for n in range(5)
    ]
    assert all(data.count(b"\n") == 1 and data.endswith(b"\n") for data in made._process.sent)
