"""The pulse of an SSH connection: what ends its commands when the worker cannot.

A worker that is frozen, or cut off from the host, kills nothing, and its connection stays open. So one channel of each
connection runs a small shell script that is told, now and then, until when the worker may work. When that moment comes,
the script ends the connection from the host's side, by ending the server's process of this connection, its own parent.
That cuts the lifeline of every supervised shell (`pool.backends.shell`), and they kill their commands.

The moment is told in the host's own time, of which every line of the script is a sample: a message that was held up on
its way, or in a frozen worker, says nothing that is no longer true.
"""

import asyncio
import logging
import shlex
from collections.abc import Callable
from time import monotonic
from typing import Any

import asyncssh

from pool.backends.base import Trust
from pool.backends.channels import Channels
from pool.errors import BackendUnavailable

logger = logging.getLogger(__name__)

_INTERVAL = 10.0
"""Seconds between two beats; a quarter of the remaining time when that is less. Each costs the host two forks."""
_UNLIMITED = 1.0
"""Seconds between two beats while there is no limit: one may come, and these cost the host nothing."""
_SHORTEST = 0.05
"""Seconds between two beats at least."""
_FAR = 1e6
"""Seconds: further ahead than any beat needs to tell."""
_SAMPLES = 8
"""Of the host's clock. The best of the last few counts: clocks drift, so an old one is worth nothing."""
_LONGEST_LINE = 4096

_MARK = "pool-pulse:"
"""Before each line of the script, so that talk of the login shell does no harm."""

# Each line of stdin: a moment of `now` in hundredths of seconds, or words for "no limit". Each answer: the present one.
# `mine`: the parent is there, is a process of the SSH server's, not the first one of the machine, and may be signalled.
# `clock` is ended by TERM at any point without leaving its `sleep` behind, not even as a zombie. That one gets KILL: a
# child that has not become `sleep` yet still has the clock's own trap.
_SCRIPT = f"""\
exec 2>/dev/null
now() {{
  IFS=' ' read -r t _ </proc/uptime || t=$(date +%s).00
  t=$((${{t%.*}} * 100 + 1${{t#*.}} - 100))
}}
mine() {{
  name= parent=
  read -r name </proc/"$PPID"/comm || name=$(ps -o comm= -p "$PPID")
  IFS=' ' read -r _ _ _ parent _ </proc/"$$"/stat || parent=$(($(ps -o ppid= -p "$$")))
  case $name in sshd|sshd[-.:]*|*/sshd|*/sshd[-.:]*|dropbear|*/dropbear) ;; *) return 1;; esac
  [ "$parent" = "$PPID" ] && [ "$PPID" -gt 1 ] && kill -0 "$PPID"
}}
stop() {{
  kill -s KILL "$!"
  wait "$!"
  exit
}}
clock() {{
  over=
  trap over=1 TERM
  while now; left=$(($1 - t)); [ "$left" -gt 0 ]; do
    cents=0$((left % 100))
    sleep "$((left / 100)).${{cents#"${{cents%??}}"}}" &
    trap stop TERM
    [ -z "$over" ] || stop
    wait "$!"
    trap over=1 TERM
  done
  [ -z "$over" ] || exit
  trap - TERM
  mine && kill -s TERM "$PPID" && sleep 1 && mine && kill -s KILL "$PPID"
}}
mine && sleep 0.0 || {{ echo "{_MARK}$name"; exit; }}
last=
now
echo "{_MARK}$t"
while read -r line; do
  [ -z "$last" ] || {{ kill "$last"; wait "$last"; last=; }}
  case $line in *[!0-9]*) ;; *) ( exec >/dev/null; clock "$line" ) & last=$!;; esac
  now
  echo "{_MARK}$t"
done
[ -z "$last" ] || {{ kill "$last"; wait "$last"; }}
exit 0
"""
_LINE = f"exec {shlex.join(['/bin/sh', '-c', _SCRIPT, 'pool-pulse'])}"  # made once: asyncssh keeps it for each channel


class Pulse(asyncssh.SSHClientSession[bytes]):
    """The channel of one connection that tells the host for how long *trust* lets this process work.

    *on_end* is called when the channel ends by itself: nothing covers the commands of the connection any more.
    """

    def __init__(self, trust: Trust, on_end: Callable[[], None]) -> None:
        self._trust = trust
        self._on_end = on_end
        self._channel: Any = None
        self._channels: Channels | None = None
        self._unread = b""
        self._clock: list[float] = []  # the host's time minus ours, in seconds, if not more
        self._answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._beating: asyncio.TimerHandle | None = None

    async def start(self, connection: asyncssh.SSHClientConnection, channels: Channels) -> str:
        """Return when the host's clock is set, or say why the host has none; what is started later is covered.

        Raises `BackendUnavailable` when the process may not work even now, asyncssh's errors when the connection is
        dead.
        """
        try:
            await channels.open_extra(connection, lambda: connection.create_session(lambda: self, _LINE, encoding=None))
        except asyncssh.ChannelOpenError as error:
            if connection.is_closed():
                raise
            return f"the server refuses one more channel: {error.reason} (MaxSessions?)"
        self._channels = channels
        if why := await self._answer:
            self._close()
            if connection.is_closed():
                raise asyncssh.ConnectionLost(why)
            return why
        # No need to wait until the script has read this: the server handles it before any later request.
        pause = self._beat()
        if pause is None:
            raise BackendUnavailable("this process may not work for its keys any more", "setup", 0.0)
        self._beat_later(pause)
        return ""

    def hurry(self) -> None:
        """Beat now: this process may work for less long than the host was told. What is started later is covered."""
        if self._beating is not None:
            self._beating.cancel()
            self._go_on()

    def stop(self) -> None:
        """Beat no more, and have the script end without doing anything. Can be repeated."""
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
        self._close()

    def _beat_later(self, pause: float) -> None:
        self._beating = asyncio.get_running_loop().call_later(pause, self._go_on)

    def _go_on(self) -> None:
        """Beat while the process may work. Then what runs is ended by the host, when it was told to."""
        try:
            pause = self._beat()
        except OSError:  # the channel is closed
            return
        except Exception:
            logger.exception("asking how long this process may work failed: taken as not any more")
            return
        if pause is not None:
            self._beat_later(pause)

    def _beat(self) -> float | None:
        """Tell the host; return the seconds until the next time, None when the process may not work any more."""
        now = monotonic()  # before asking: a freeze between the two makes the moment too early, never too late
        left = self._trust()
        if left is not None and left <= 0:
            return None
        told, pause = "no limit", _UNLIMITED
        if left is not None:
            told = str(max(0, int(100 * (now + min(left, _FAR) + max(self._clock)))))
            pause = max(_SHORTEST, min(_INTERVAL, left / 4))
        self._channel.write(f"{told}\n".encode())
        return pause

    def _close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    # -- called by asyncssh

    def connection_made(self, chan: Any) -> None:
        self._channel = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype is not None:
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._unread = self._unread[-_LONGEST_LINE:]
        for line in lines:
            _, mark, said = line.decode("utf-8", "replace").rpartition(_MARK)
            if mark and said.isdecimal():
                self._clock = [*self._clock, int(said) / 100 - monotonic()][-_SAMPLES:]
                self._answered("")
            elif mark:
                self._answered(f"a session's parent, {said!r}, is no process of the connection's that it may end")

    def _answered(self, why: str) -> None:
        if not self._answer.done():
            self._answer.set_result(why)

    def connection_lost(self, exc: Exception | None) -> None:
        stopped, self._channel = self._channel is None, None
        if self._channels is not None:
            self._channels.extra_closed()
        self._answered(str(exc or "the script ended"))
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
            if not stopped:
                self._on_end()
