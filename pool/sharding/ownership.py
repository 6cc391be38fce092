"""Which shards this node owns at this moment: the one place where task code, and a prefork child, can look.

Written by the coordinator, read by whoever is about to work for a key. It lives in memory that forked children share,
so a child knows without asking, even while its parent is stopped.
"""

import mmap
import time

FOREVER = float("inf")

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Return seconds on a clock that never jumps and, where the system has one, goes on while the machine sleeps."""
    return time.clock_gettime(_CLOCK)


class Ownership:
    """The epochs of this node's shards, and until when they may be trusted.

    *grace*: seconds after that for which what runs may go on where a host ends it for a newer owner.
    """

    def __init__(self, shards: int, grace: float = 0.0) -> None:
        self.shards = shards
        self.grace = grace
        memory = memoryview(mmap.mmap(-1, 8 * (3 * shards + 4)))
        self._times = memory[:8].cast("d")  # trusted until
        self._rounds = memory[8:32].cast("Q")  # dropped so far, dropped and cleared away, process that clears
        self._epochs = memory[32 : 32 + 8 * shards].cast("Q")  # 0: not ours
        # Epochs of shards that may be ours; 0: not, or surely. Then how often each was suspended or dropped.
        self._suspended = memory[32 + 8 * shards : 32 + 16 * shards].cast("Q")
        self._losses = memory[32 + 16 * shards :].cast("Q")

    # -- asking

    def owns(self, shard: int) -> bool:
        """Whether a task of *shard* may work now."""
        return bool(self._epochs[shard]) and now() < self._times[0]

    def may_go_on(self, shard: int) -> bool:
        """Whether what runs for *shard* may do so, if a host ends it for a newer owner."""
        return bool(self._epochs[shard] or self._suspended[shard]) and now() < self._times[0] + self.grace

    def epoch(self, shard: int) -> int:
        """The epoch under which *shard* is held: it grows with each new owner. 0: not held."""
        return self._epochs[shard]

    def losses(self, shard: int) -> int:
        """How often *shard* was suspended or dropped so far."""
        return self._losses[shard]

    @property
    def count(self) -> int:
        """How many shards are held."""
        return sum(1 for epoch in self._epochs if epoch)

    @property
    def suspended(self) -> int:
        """How many shards may be ours still, but nobody can say (`suspend`)."""
        return sum(1 for epoch in self._suspended if epoch)

    @property
    def trusted_until(self) -> float:
        """When all of it ends unless it is renewed (see `now`)."""
        return self._times[0]

    def remaining(self) -> float | None:
        """Seconds for which this node may still work; None: no limit."""
        return None if self._times[0] == FOREVER else self._times[0] - now()

    # -- telling

    def trust(self, until: float) -> None:
        """The leases hold until then."""
        self._times[0] = until

    def hold(self, shard: int, epoch: int) -> None:
        """Tasks of the shard may work from now on."""
        self._epochs[shard] = epoch
        self._suspended[shard] = 0

    def suspend(self, shard: int) -> None:
        """No task of the shard may begin to work, until it is held again; see `may_go_on`."""
        self._suspended[shard] = self._epochs[shard] or self._suspended[shard]
        self._epochs[shard] = 0
        self._losses[shard] += 1
        self._rounds[0] += 1

    def drop(self, shard: int) -> None:
        """No task of the shard may work any more."""
        self._epochs[shard] = self._suspended[shard] = 0
        self._losses[shard] += 1
        self._rounds[0] += 1

    # -- the process that has the backends

    @property
    def dropped(self) -> int:
        """How many drops there were."""
        return self._rounds[0]

    @property
    def cleared(self) -> int:
        """Up to which drop the backends are closed."""
        return self._rounds[1]

    @cleared.setter
    def cleared(self, count: int) -> None:
        self._rounds[1] = count

    @property
    def host(self) -> int:
        """Id of the process that has the backends; 0: none."""
        return self._rounds[2]

    @host.setter
    def host(self, pid: int) -> None:
        self._rounds[2] = pid
