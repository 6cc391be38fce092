"""Live output without Redis: buffers, the tape of an attempt, and what a reader makes of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.errors import ConfigError
from pool.live.follow import afollow, follow
from pool.live.format import Piece, Transcript, live_key
from pool.live.output import LiveOutput
from pool.live.pending import ENTRY_COST, Pending
from pool.live.stopwatch import Stopwatch
from pool.live.tape import Tape


class FakeStream:
    """What a Redis does with the commands of a tape, on one key."""

    def __init__(self) -> None:
        self.clock = 0
        self.lose()

    def lose(self) -> None:
        self.entries: dict[int, dict[bytes, bytes]] = {}
        self.exists = False
        self.expires = False

    @property
    def size(self) -> int:
        return sum(len(fields.get(b"data", b"")) + ENTRY_COST for fields in self.entries.values())

    def run(self, commands):
        return [getattr(self, "do_" + name.split()[0].lower())(*rest) for name, *rest in commands]

    def do_memory(self, _key):
        return self.size if self.exists else None

    def do_pexpire(self, _key, _ttl):
        self.expires = self.exists
        return int(self.exists)

    def do_xadd(self, _key, *rest):
        if rest[0] == "NOMKSTREAM":
            if not self.exists:
                return None
            rest = rest[1:]
        assert rest[0] == "*"
        self.exists = True
        self.clock += 1
        encoded = [text if isinstance(text, memoryview) else str(text).encode() for text in rest[1:]]
        self.entries[self.clock] = {bytes(n): bytes(v) for n, v in zip(encoded[::2], encoded[1::2], strict=True)}
        return str(self.clock).encode()

    def do_xdel(self, _key, *ids):
        return sum(self.entries.pop(int(entry), None) is not None for entry in ids)

    def do_xtrim(self, _key, how, first):
        assert how == "MINID"
        self.entries = {number: fields for number, fields in self.entries.items() if number >= int(first)}
        return 1


class Writer:
    """One attempt: does what `LiveOutput` does, when it is told to."""

    def __init__(
        self,
        stream: FakeStream,
        keep: int = 10_000,
        limit: int = 2000,
        entry: int = 500,
        *,
        node: str = "one",
        attempt: str | None = None,
    ) -> None:
        self.stream = stream
        self.pending = Pending(limit, entry)
        self.tape = Tape("key", {"name": "build", "node": node}, keep, 60.0, attempt)
        self.flying = []
        self.fed: dict[str, bytes] = {}
        self.end = None
        self.done = False

    def feed(self, stream: str, data: bytes, missing: int = 0) -> None:
        self.fed[stream] = self.fed.get(stream, b"") + bytes(missing) + data
        self.pending.add(stream, data, missing)

    def flush(self, how: str = "ok", limit: int = 1500) -> None:
        self.flying = self.flying or self.pending.take(limit)
        end = self.end if not self.pending and not self.done else None
        commands = self.tape.commands(self.flying, end)
        replies = self.stream.run(commands) if how != "unreachable" else []
        if how != "ok":
            self.tape.forget()
        elif self.tape.written(replies):
            self.flying = []
            self.done = self.done or end is not None

    def close(self, state: str = "SUCCESS") -> None:
        self.end = {"state": state, "streams": self.pending.totals}
        while not self.done:
            self.flush()


class Reader:
    """Follows a fake stream and keeps what it was told."""

    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.position = 0
        self.transcript = Transcript()
        self.pieces: list[Piece] = []

    def read(self) -> None:
        for number, fields in self.stream.entries.items():
            if number > self.position:
                self.position = number
                self.pieces += self.transcript.add(fields)

    def check(self, fed: dict[str, bytes]) -> None:
        """Pieces and gaps, in order, are a stream's bytes from its first one on."""
        positions: dict[str, int] = {}
        for piece in self.pieces:
            if piece.kind == "output":
                assert piece.skipped >= 0
                assert piece.offset == positions.get(piece.stream, 0) + piece.skipped
                assert piece.data == fed[piece.stream][piece.offset :][: len(piece.data)]
                positions[piece.stream] = piece.offset + len(piece.data)
        if self.transcript.over:
            assert positions == {stream: len(data) for stream, data in fed.items() if data}

    @property
    def kinds(self) -> list[str]:
        return [piece.kind for piece in self.pieces]


STEPS = st.one_of(
    st.tuples(st.just("feed"), st.sampled_from(["stdout", "stderr", "update"]), st.binary(max_size=1200)),
    st.tuples(st.just("flush"), st.sampled_from(["ok", "ok", "ok", "unreachable", "no reply"])),
    st.tuples(st.sampled_from(["read", "read", "lose"])),
)


@given(st.lists(STEPS, max_size=40), st.sampled_from([1000, 3000, 100_000]))
def test_pieces_and_gaps_add_up_to_what_was_written(steps, keep):
    """Whatever is dropped, trimmed, lost or written twice, for one who follows and for one who comes late."""
    stream = FakeStream()
    writer, reader, late = Writer(stream, keep, limit=min(2000, keep)), Reader(stream), Reader(stream)
    for step, *arguments in steps:
        match step:
            case "feed":
                writer.feed(*arguments)
            case "flush":
                writer.flush(*arguments)
            case "read":
                reader.read()
            case "lose":
                stream.lose()
    writer.close()
    for one in (reader, late):
        one.read()
        one.check(writer.fed)
        assert one.transcript.over
        assert one.kinds.count("begin") == one.kinds.count("end") == 1
    assert stream.expires


@given(st.lists(st.tuples(st.integers(1, 4000), st.booleans()), max_size=30), st.integers(3000, 9000))
def test_the_stream_stays_within_its_bound(writes, keep):
    """Over attempts, and over connections that break after the server has done its part."""
    stream = FakeStream()
    for attempt in range(3):
        writer = Writer(stream, keep, limit=1000, entry=300)
        for size, breaks in writes:
            writer.feed("stdout", bytes([attempt]) * size)
            writer.flush("no reply" if breaks else "ok")
        writer.close()
        writer.flush()
        assert not writer.tape.excess
        assert stream.size <= keep + 12 * ENTRY_COST + 1000  # begins and ends, and one batch before anything is known


def test_the_begin_outlives_the_output():
    """One who comes late sees what the attempt is, then the newest output, and how much is missing."""
    stream = FakeStream()
    writer = Writer(stream, keep=3000)
    for number in range(40):
        writer.feed("stdout", b"%03d" % number * 100)
        writer.flush()
    reader = Reader(stream)
    reader.read()
    assert reader.kinds[0] == "begin"
    assert reader.pieces[0].facts == {"name": "build", "node": "one", "attempt": writer.tape.attempt}
    assert reader.pieces[1].skipped == reader.pieces[1].offset > 5000
    assert reader.pieces[-1].data.endswith(b"039")


def test_pieces_of_one_stream_share_an_entry():
    """Many small ones are few entries; each stream keeps its own; none is larger than the bound."""
    pending = Pending(10_000, 100)
    for _ in range(30):
        pending.add("stdout", b"0123456789")
    pending.add("stderr", b"x")
    pending.add("stdout", b"z")
    pending.add("stdout", b"y" * 250)
    chunks = pending.take(100_000)
    assert [(chunk.stream, chunk.offset, len(chunk.data)) for chunk in chunks] == [
        ("stdout", 0, 100), ("stdout", 100, 100), ("stdout", 200, 100), ("stderr", 0, 1), ("stdout", 300, 1),
        ("stdout", 301, 100), ("stdout", 401, 100), ("stdout", 501, 50),
    ]  # fmt: skip
    assert not pending
    assert pending.size == 0


def test_a_full_buffer_drops_the_oldest_and_counts_everything():
    """Bytes and lines are those of the command, not of what was kept."""
    pending = Pending(1000, 100)
    for number in range(1000):
        pending.add("stdout", b"%07d\n" % number)
    assert pending.size <= 1000
    assert (pending.totals, pending.lines) == ({"stdout": 8000}, 1000)  # of lines of one length
    chunks = pending.take(100_000)
    assert bytes(chunks[-1].data).endswith(b"0000999\n")
    assert chunks[-1].offset + len(chunks[-1].data) == 8000


def test_the_first_output_is_not_dropped_before_it_is_taken():
    """A follower of a flood sees how it began."""
    pending = Pending(1000, 100)
    pending.add("stderr", b"first")
    for _ in range(100):
        pending.add("stdout", b"x" * 100)
    assert pending.take(1)[0].data == b"first"
    assert pending.size <= 1000
    for _ in range(100):
        pending.add("stdout", b"y" * 100)
    assert pending.take(1)[0].data == b"y" * 100
    pending.shrink(0)
    assert not pending


def test_tiny_pieces_of_two_streams_do_not_fill_the_memory():
    """What a chunk costs besides its data counts, too."""
    pending = Pending(10_000, 1000)
    for _ in range(10_000):
        pending.add("stdout", b"x")
        pending.add("stderr", b"y")
    assert len(pending.take(1 << 30)) <= 10_000 / ENTRY_COST


def test_a_retry_is_not_the_end():
    """Only a state after which nothing follows ends the last attempt."""
    stream = FakeStream()
    reader = Reader(stream)
    first = Writer(stream)
    first.feed("stdout", b"one")
    first.close("RETRY")
    reader.read()
    assert not reader.transcript.over
    second = Writer(stream)
    second.feed("stdout", b"two")
    second.flush()
    reader.read()
    assert not reader.transcript.over
    second.close("FAILURE")
    reader.read()
    assert reader.transcript.over
    assert reader.kinds == ["begin", "output", "end"] * 2
    assert [piece.offset for piece in reader.pieces if piece.kind == "output"] == [0, 0]


def test_the_end_of_an_attempt_that_was_replaced_is_not_the_end():
    """A worker that was believed dead ends while the second attempt runs."""
    stream = FakeStream()
    old, new, reader = Writer(stream), Writer(stream), Reader(stream)
    old.flush()
    new.flush()
    old.feed("stdout", b"late")
    old.close("SUCCESS")
    reader.read()
    assert not reader.transcript.over
    new.close("SUCCESS")
    reader.read()
    assert reader.transcript.over


@pytest.mark.parametrize("last_words", [None, "RETRY", "late REJECTED"], ids=str)
def test_an_attempt_that_another_worker_goes_on_with_continues_at_the_next_byte(last_words):
    """Killed, ended in good order, or believed dead: each byte is shown once, and the end is that of the second one."""
    stream = FakeStream()
    first, second = (Writer(stream, node=node, attempt="durable") for node in ("one", "two"))
    reader = Reader(stream)
    first.feed("stdout", b"one ")
    first.feed("stderr", b"!")
    first.flush()
    if last_words == "RETRY":
        first.close("RETRY")
    reader.read()
    second.feed("stdout", b"one tw")
    second.feed("stderr", b"!?")
    second.flush()
    if last_words == "late REJECTED":
        first.close("REJECTED")
    second.feed("stdout", b"o three", 5)
    second.close("SUCCESS")
    reader.read()
    assert reader.transcript.over
    told = [
        (piece.stream, piece.data, piece.offset, piece.skipped) for piece in reader.pieces if piece.kind == "output"
    ]
    assert told == [
        ("stdout", b"one ", 0, 0),
        ("stderr", b"!", 0, 0),
        ("stdout", b"tw", 4, 0),
        ("stderr", b"?", 1, 0),
        ("stdout", b"o three", 11, 5),
    ]
    begins = [piece.facts["node"] for piece in reader.pieces if piece.kind == "begin"]
    assert begins == ["one", "two"]
    assert reader.pieces[-1].facts["state"] == "SUCCESS"


def test_output_that_was_dropped_at_the_end_is_told_before_it():
    """The totals of the end entry say so."""
    transcript = Transcript()
    facts = json.dumps({"state": "SUCCESS", "streams": {"stdout": 10, "stderr": 0}}).encode()
    told = transcript.add({b"kind": b"end", b"attempt": b"a", b"facts": facts})
    assert told[1] == Piece("stdout", b"", 10, 10)
    assert [piece.kind for piece in told] == ["begin", "output", "end"]
    assert told[-1].facts == {"state": "SUCCESS", "attempt": "a"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"kind": b"other", b"attempt": b"a"},
        {b"kind": b"begin", b"facts": b"not json"},
        {b"kind": b"output", b"offset": b"-5"},
        {b"kind": b"end", b"attempt": b"\xff", b"facts": b"[]"},
        {b"kind": b"end", b"facts": b'{"streams": {"stdout": "many"}}'},
        {b"kind": b"end", b"facts": b'{"streams": 5}'},
    ],
)
def test_entries_that_somebody_else_wrote_do_no_harm(fields):
    """They say nothing, or as little as they say."""
    assert all(isinstance(piece, Piece) and not piece.data for piece in Transcript().add(fields))


def test_an_error_of_redis_is_raised_and_everything_begun_again():
    """Nothing is known of the stream any more; a server that does not tell its memory is no error."""
    tape = Tape("key", {}, 1000, 1.0)
    tape.commands([])
    assert tape.written([ValueError("no such command"), b"1-0", 1])
    tape.commands([], {"state": "SUCCESS"})
    with pytest.raises(OSError, match="full"):
        tape.written([OSError("full"), 1])
    assert tape.commands([])[0] == ("MEMORY USAGE", "key")


def test_the_key_has_the_hash_tag_of_the_namespace():
    """So it shares the slot of the others."""
    assert live_key("pool", "0b1f") == "{pool}:live:0b1f"


@pytest.mark.parametrize("door", [follow, afollow])
def test_what_cannot_be_followed_is_said_at_once(door):
    """Not at the first piece."""
    for bad in ("", None, 5):
        with pytest.raises(ConfigError, match="must be the id of a task"):
            door(bad, url="redis://127.0.0.1:1")
    with pytest.raises(ConfigError, match="timeout"):
        door("a", url="redis://127.0.0.1:1", timeout=0)
    with pytest.raises(ConfigError, match="amqp"):
        door("a", url="amqp://127.0.0.1:1")
    with pytest.raises(ConfigError, match="has no pool"):
        door("a", app=object())


@pytest.mark.parametrize(("name", "value"), [("keep_bytes", 0), ("ttl", 0), ("ttl", float("nan"))])
def test_a_bound_that_is_none_is_refused(name, value):
    """When the writer is made, not when a build runs."""
    with pytest.raises(ConfigError, match=name):
        LiveOutput("redis://127.0.0.1:1", "pool", **{"keep_bytes": 1, "ttl": 1.0, name: value})


def test_a_stopwatch_passes_on_what_happens():
    """Results, exceptions, and what is thrown in from outside."""

    class Pause:
        def __await__(self):
            return (yield "waiting")

    async def work():
        try:
            return await Pause()
        except KeyError:
            return "caught"

    steps = Stopwatch(work()).__await__()
    assert next(steps) == "waiting"
    with pytest.raises(StopIteration, match="caught"):
        steps.throw(KeyError())
    steps = Stopwatch(work()).__await__()
    next(steps)
    with pytest.raises(ZeroDivisionError):
        steps.throw(ZeroDivisionError())
