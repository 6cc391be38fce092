"""What a worker makes of the bytes that a helper sends, however they are cut."""

import asyncio

import pytest

from pool.backends.helper import _LARGEST, Helper
from pool.helper import wire


class Call:
    def __init__(self):
        self.heard = []

    def feed(self, kind, data):
        if self.heard and self.heard[-1][0] == kind:
            self.heard[-1] = kind, self.heard[-1][1] + data
        else:
            self.heard.append((kind, data))

    def answer(self, kind, payload):
        self.heard.append((kind, payload))


FRAMES = [(wire.OUT, b"out" * 50), (wire.ERR, b""), (wire.CREDIT, b"1234"), (wire.ERR, b"e"), (wire.DONE, b"d" * 300)]


def helper_with(call):
    helper = Helper(lambda error: error, lambda helper: None)
    helper._begun = True
    helper._calls[7] = call
    return helper


@pytest.mark.parametrize("size", [1, 2, 8, 9, 10, 100, 10_000])
def test_frames_are_put_together_however_they_are_cut(size):
    """Output as it comes, everything else as a whole."""

    async def main():
        call = Call()
        helper = helper_with(call)
        data = b"".join(wire.frame(kind, 7, payload) for kind, payload in FRAMES)
        for at in range(0, len(data), size):
            helper.data_received(data[at : at + size], None)
        assert call.heard == [frame for frame in FRAMES if frame[1]]

    asyncio.run(main())


def test_a_large_answer_is_looked_at_when_it_is_complete():
    """Not with each piece, all over again."""

    async def main():
        call = Call()
        helper = helper_with(call)
        frame = wire.frame(wire.DONE, 7, bytes(1 << 20))
        pieces = [frame[at : at + 1000] for at in range(0, len(frame), 1000)]
        for piece in pieces[:-1]:
            helper.data_received(piece, None)
            assert isinstance(helper._unread, bytearray)
        assert helper._wanted == len(frame)
        helper.data_received(pieces[-1], None)
        assert call.heard == [(wire.DONE, bytes(1 << 20))]
        assert helper._wanted == 0

    asyncio.run(main())


def test_a_frame_without_bounds_is_refused():
    """A host cannot have the worker wait for gigabytes."""

    async def main():
        helper = helper_with(Call())
        with pytest.raises(ValueError, match="is announced"):
            helper.data_received(wire.HEADER.pack(wire.DONE, 7, _LARGEST + 1), None)

    asyncio.run(main())
