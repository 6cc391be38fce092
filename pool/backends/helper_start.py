"""When a connection gets its helper: on first use, once; again when it was killed; not on a host without python3."""

import asyncio
import logging
from collections.abc import Callable
from hashlib import sha256
from time import monotonic

import asyncssh

from pool.backends.base import Claim, Trust
from pool.backends.channels import Channels
from pool.backends.helper import Helper, NoHelper
from pool.backends.helper_files import HelperFiles
from pool.errors import BackendUnavailable, FileOperationFailed, NotOwner, PoolError
from pool.helper import wire

logger = logging.getLogger(__name__)

EXEC_MODES = ("auto", "helper", "channel")

_REMEMBERED = 600.0
"""Seconds until a host without a helper is asked again."""

_IN_ORDER = ("", "exit code 0", f"exit code {wire.OVER}")
"""What is said of a helper whose commands have ended; "": of one whose connection has, and so will they."""

_DOUBT = 0.05
"""Seconds between two looks at whether this process is the owner again."""

Where = tuple[str, int, str | None]
"""Host, port and user."""

_without: dict[Where, tuple[str, float]] = {}  # why a host has none, and until when that is believed


class Launcher:
    """Starts the helper of one connection. *mode*: of `EXEC_MODES`. *lost*, *startup_files*: as for `Helper`.

    *trust*, *claim*: as of `Backend`. A helper ends itself, with what it runs, when the trust is over, or the grace
    after it once it has claimed the root.
    """

    def __init__(
        self,
        connection: asyncssh.SSHClientConnection,
        channels: Channels,
        where: Where,
        mode: str,
        lost: Callable[[Exception | None], PoolError],
        *,
        startup_files: bool,
        trust: Trust | None = None,
        claim: Callable[[], Claim | None] | None = None,
    ) -> None:
        self._trust = trust
        self._claim_of = claim
        self._claiming = asyncio.Lock()
        self._unfenced = False
        self.root = ""
        """Where commands run; set before the first one."""
        self._startup_files = startup_files
        self._connection, self._channels, self._where, self._mode, self._lost = connection, channels, where, mode, lost
        self._helper: Helper | None = None
        self._starting: asyncio.Task[None] | None = None
        self._left: list[bytes] = []  # by a helper that was killed
        self._closed = False

    @property
    def describe(self) -> str:
        """How commands travel, in a few words."""
        if self._helper is not None:
            return "helper"
        why = self._why_not()
        return f"channel: {why}" if why else "channel" if self._mode == "channel" else ""

    @property
    def by_channels(self) -> bool:
        """Whether that is known to be by channels."""
        return self._mode == "channel" or (self._mode == "auto" and bool(self._why_not()))

    def _why_not(self) -> str:
        """Why this host is believed to have none; "" when it is not."""
        why, until = _without.get(self._where, ("", 0.0))
        return why if monotonic() < until else ""

    @property
    def fenced(self) -> bool:
        """Whether a newer owner of the root ends the helper, and with it what runs."""
        return self.running is not None and self.running.epoch > 0

    @property
    def running(self) -> Helper | None:
        """The helper, if it runs."""
        return None if self._helper is None or self._helper.closed else self._helper

    async def helper(self) -> Helper | None:
        """Return the helper, started if it does not run; None: commands go over channels.

        Raises `BackendUnavailable` when there must be one and is none, or the connection is lost.
        """
        helper = self.running or await self._started_helper()
        if helper is not None and self._claim_of is not None and not self._unfenced:
            await self._stand(helper, self._claim_of)
        return helper

    async def _started_helper(self) -> Helper | None:
        if self.by_channels:
            return None
        try:
            await asyncio.shield(self._begin())
        except NoHelper as error:
            if self._mode == "auto":
                return None
            raise BackendUnavailable(f"{self._where[0]}: exec_mode='helper': {error}", "setup", None) from error
        except asyncssh.Error as error:
            raise self._lost(error) from error
        return self._helper

    async def files(self) -> HelperFiles | None:
        """Return the file operations of the helper; None: files go by SFTP. Raises as `helper`."""
        helper = await self.helper()
        return None if helper is None else HelperFiles(helper)

    def _begin(self) -> "asyncio.Task[None]":
        """Start one, unless that is under way."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._started)
        return self._starting

    async def _start(self) -> None:
        helper = Helper(self._lost, self._ended, self._left_to_work if self._trust is not None else None)
        try:
            await helper.start(self._connection, self._channels, self._left, startup_files=self._startup_files)
        except (NoHelper, BackendUnavailable) as error:
            if self._closed or self._connection.is_closed():  # what looks like a refusal is the end of the connection
                raise self._lost(None) from error
            if isinstance(error, BackendUnavailable):
                raise
            _without[self._where] = str(error), monotonic() + _REMEMBERED
            logger.info("%s runs no helper, each command has a channel of its own: %s", self._where[0], error)
            raise
        self._left = []
        self._helper = helper
        if self._closed:
            helper.close()

    def _left_to_work(self) -> float | None:
        """For how many seconds the host is to believe in this process; None: for as long as it likes."""
        left = None if self._trust is None else self._trust()
        claim = self._claim_of() if self._claim_of is not None and self.fenced else None
        return left if left is None or claim is None else left + claim.grace

    def _started(self, starting: "asyncio.Task[None]") -> None:
        self._starting = None
        if not starting.cancelled():
            starting.exception()  # told to whoever waits; it may be nobody

    def _ended(self, helper: Helper) -> None:
        """The helper ended by itself. If it was killed, what it ran goes on, until the next one, begun now, ends it.

        Without anything to end, the next is begun when it is wanted: one that dies at once is not begun for ever.
        """
        self._left = helper.left
        if helper.how in _IN_ORDER or self._connection.is_closed() or self._closed:
            return
        logger.warning("%s: the helper ended (%s)", self._where[0], helper.how)
        if self._left:
            self._begin()

    async def _stand(self, helper: Helper, claim_of: Callable[[], Claim | None]) -> None:
        """Have the helper claim the root under the present epoch, if it has not: older owners are ended there.

        Waits while nobody can say who the owner is. Raises `NotOwner`. A host that cannot keep a fence does without,
        with a warning.
        """
        claim = claim_of()
        while claim is not None and not claim.epoch and claim.grace and self.fenced:
            await asyncio.sleep(_DOUBT)
            claim = claim_of()
        if claim is None or claim.epoch == helper.epoch:
            return
        async with self._claiming:
            if claim.epoch == helper.epoch:
                return
            if not claim.epoch:
                raise NotOwner(f"this node does not own {claim.owner_of!r} any more")
            scope = sha256(claim.owner_of.encode("utf-8", "surrogateescape")).hexdigest()[:32].encode()
            root = self.root.encode("utf-8", "surrogateescape")
            try:
                answer = await helper.operate("claim", ".", root, scope, b"%d" % claim.epoch)
            except FileOperationFailed as error:
                self._unfenced = True
                logger.warning("%s cannot keep older owners out of %r: %s", self._where[0], self.root, error)
                return
            if answer.result:
                newer = int(answer.result)
                text = (
                    f"{self._where[0]}: a newer owner (epoch {newer}) has taken {self.root!r} over from {claim.epoch}"
                )
                raise NotOwner(text, newer)
            helper.epoch = claim.epoch

    def close(self) -> None:
        """End the helper, and what it runs."""
        self._closed = True
        if self._helper is not None:
            self._helper.close()
