"""The watchdog of an SSH connection: it ends the connection's commands when the worker cannot and no helper does.

One channel runs a small shell script that hears the pulse (`pool.backends.pulse`). When the moment comes until which
the worker may work, the script ends the connection from the host's side, by ending the server's process of this
connection, its own parent. That cuts the lifeline of every supervised shell (`pool.backends.shell`), and they kill
their commands. Each beat costs the host two forks.
"""

import asyncio
import shlex
from collections.abc import Callable
from typing import Any

import asyncssh

from pool.backends.base import Trust
from pool.backends.channels import Channels
from pool.backends.pulse import Pulse

_LONGEST_LINE = 4096

_MARK = "pool-watchdog:"
"""Before each line of the script, so that talk of the login shell does no harm."""

_ENDED = "the script ended"

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
_LINE = f"exec {shlex.join(['/bin/sh', '-c', _SCRIPT, 'pool-watchdog'])}"


class Watchdog:
    """Ends *connection* from the host's side when *trust* is over. What is started after `start` or `enter` is covered.

    Where there can be none, *without* is called with the reason, and the connection goes on.
    """

    __slots__ = ("_channels", "_connection", "_entered", "_for_good", "_script", "_starting", "_trust", "_without")

    def __init__(
        self,
        connection: asyncssh.SSHClientConnection,
        channels: Channels,
        trust: Trust,
        without: Callable[[str], None],
    ) -> None:
        self._connection, self._channels, self._trust, self._without = connection, channels, trust, without
        self._script: _Script | None = None
        self._starting: asyncio.Task[None] | None = None
        self._entered = 0
        self._for_good = False

    def begin(self) -> "asyncio.Task[None]":
        """Begin to start it, if it does not run: it will be wanted soon."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._forget_failure)
        return self._starting

    async def start(self) -> None:
        """Return when it runs, for as long as the connection lasts, or cannot.

        Raises `BackendUnavailable` when this process may not work even now, asyncssh's errors when the connection is
        dead.
        """
        self._for_good = True
        await asyncio.shield(self.begin())

    async def enter(self) -> None:
        """Return when it runs, until `leave` was called as often, or cannot. Raises as `start`."""
        self._entered += 1
        try:
            await asyncio.shield(self.begin())
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """End it, unless it is needed all the same."""
        self._entered -= 1
        if not (self._entered or self._for_good):
            self.stop()

    def stop(self) -> None:
        """Have the script end without doing anything. Can be repeated."""
        self._starting = None
        self._end_script()

    def _end_script(self) -> None:
        self._channels.give_up = None
        script, self._script = self._script, None
        if script is not None:
            script.stop()

    def _forget_failure(self, starting: "asyncio.Task[None]") -> None:
        if (starting.cancelled() or starting.exception()) and self._starting is starting:
            self._starting = None

    async def _start(self) -> None:
        self._script = script = _Script(self._trust, self._connection.abort)
        try:
            why = await script.start(self._connection, self._channels)
        except BaseException:
            script.stop()
            raise
        if self._script is not script:  # stopped meanwhile
            script.stop()
        elif why:
            self._go_without(why)
        else:
            self._channels.give_up = lambda: self._go_without("it needs one session more (MaxSessions?)")

    def _go_without(self, why: str) -> None:
        self._end_script()
        self._without(why)


class _Script(asyncssh.SSHClientSession[bytes]):
    """The channel of the script. *on_end* is called when it ends by itself: nothing covers the commands any more."""

    def __init__(self, trust: Trust, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._channel: Any = None
        self._channels: Channels | None = None
        self._unread = b""
        self._answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pulse = Pulse(trust, self._tell)

    async def start(self, connection: asyncssh.SSHClientConnection, channels: Channels) -> str:
        """Return when the host's clock is set, or say why the host has none. Raises as `Watchdog.start`."""
        try:
            await channels.open_extra(connection, lambda: connection.create_session(lambda: self, _LINE, encoding=None))
        except asyncssh.ChannelOpenError as error:
            if connection.is_closed():
                raise
            return f"the server refuses one more channel: {error.reason} (MaxSessions?)"
        self._channels = channels
        why = await self._answer
        if not why:
            try:
                self._pulse.start()  # no need to wait until the script has read it: the server handles it first
            except OSError:  # it has ended since
                why = _ENDED
        if why:
            self.stop()
            if connection.is_closed():
                raise asyncssh.ConnectionLost(why)
        return why

    def stop(self) -> None:
        """Beat no more, and have the script end without doing anything. Can be repeated."""
        self._pulse.stop()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _tell(self, moment: int | None) -> None:
        if self._channel is None:
            raise BrokenPipeError(_ENDED)
        self._channel.write(b"no limit\n" if moment is None else b"%d\n" % moment)

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
                self._pulse.sample(int(said))
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
        self._answered(str(exc or _ENDED))
        beating = self._pulse.beating
        self._pulse.stop()
        if beating and not stopped:
            self._on_end()
