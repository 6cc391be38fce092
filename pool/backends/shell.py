"""The supervised shell: how a command runs, on this machine and on a remote one.

A small POSIX shell script runs the command in the session's process group; its stdin is empty, or a file with what it
is to read. The script's own stdin is a lifeline that the worker holds: when it ends before the command - a timeout, a
cancel, a lost connection, a worker that was killed - the whole process group gets TERM, then KILL. So nothing outlives
whoever asked for it. What a command left running in the background when it ended stays, and so does one that makes a
session of its own, such as a daemon.

`PipedCommand` is for a process that talks through its stdin: a coding agent, a server. There the lifeline carries the
data, and what the process started ends with it, in whatever session it is.
"""

import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pool.backends.paths import encodable
from pool.errors import ConfigError, FileOperationFailed, PathEscapeError

KILL_GRACE = 0.5
"""Seconds between TERM and KILL."""

EOF_GRACE = 0.3
"""Seconds that a piped process gets to end by itself when its input has ended; then comes TERM."""

MARK = "POOL_AGENT"
"""Variable in the environment of a piped process and of all that it starts; its value ends with the token."""

_NOTICE_CODE = 254

_ROUNDS = " ".join(map(str, range(20)))
"""Looks for what a piped process left; three in a row must find nothing: during its exec a process shows no mark."""

_ARGUMENT_LIMIT = 60_000
"""Bytes, quoted. A longer command goes through stdin: Linux takes at most 128 KiB in one argument ..."""
_SHELL_LIMIT = 30_000
"""... and so does the command's own shell: one with more characters, of at most 4 bytes, is read as a file."""

_BOURNE = frozenset({"ash", "bash", "dash", "ksh", "mksh", "sh"})
"""Login shells that can run the script themselves; others start /bin/sh for it."""

# $1 command  $2 token  $3 "s" if a line of setup comes first on stdin  $4... folders, each inside the one before
_SCRIPT = f"""\
exec 3<&0 </dev/null
if [ "$3" = s ]; then IFS= read -r _pool_line <&3 || exit {_NOTICE_CODE}; eval "$(printf %b "$_pool_line")"; fi
_pool_command=$1 _pool_token=$2 _pool_root=
shift 3
for _pool_line do
  cd -P -- "$_pool_line" 2>/dev/null || {{ echo "$_pool_token cwd" >&2; exit {_NOTICE_CODE}; }}
  case "${{PWD%/}}/" in "${{_pool_root%/}}"/*) ;; *) echo "$_pool_token escape $PWD" >&2; exit {_NOTICE_CODE};; esac
  _pool_root=$PWD
done
( trap "" TERM HUP INT; read -r _pool_line <&3; kill -s USR1 "$$"; kill -s TERM -- "-$$"
  sleep {KILL_GRACE}; kill -s KILL -- "-$$" ) >/dev/null 2>&1 &
_pool_guard=$!
exec 3<&- 4>&2 2>/dev/null
_pool_ended=
trap _pool_ended=1 USR1
trap : TERM
( exec 2>&4 4>&-
  if [ "${{#_pool_command}}" -le {_SHELL_LIMIT} ]; then exec /bin/sh -c "$_pool_command"; fi
  exec /bin/sh -c ". /dev/fd/9" /bin/sh 9<<POOL
$_pool_command
POOL
)
_pool_code=$?
[ -n "$_pool_ended" ] && wait "$_pool_guard"
kill -s KILL "$_pool_guard" 2>/dev/null
exit "$_pool_code"
"""

# The same arguments. The left side passes stdin on; at its end everything is killed. $2 is also what the environment of
# all that the process starts carries (MARK), by which those are found that have left the process group.
_PIPE_SCRIPT = f"""\
exec 3<&0 </dev/null
_pool_line= _pool_none= _pool_token=$2
if [ "$3" = s ]; then IFS= read -r _pool_line <&3 || exit {_NOTICE_CODE}; fi
trap : TERM
_pool_kill() {{
  for _pool_round in {_ROUNDS}; do
    _pool_left=$(grep -ls -- "$_pool_token" /proc/[0-9]*/environ)
    if [ -z "$_pool_left" ]; then _pool_none=1$_pool_none; else _pool_none=; fi
    for _pool_file in $_pool_left; do
      _pool_file=${{_pool_file#/proc/}}
      kill -s KILL "${{_pool_file%/environ}}"
    done
    case $_pool_none in 111) break;; esac
    sleep 0.1
  done
  kill -s KILL -- "-$$"
}}
{{ trap "" TERM HUP INT; exec 2>/dev/null; cat <&3; exec >/dev/null; sleep {EOF_GRACE}
  kill -s TERM -- "-$$"; sleep {KILL_GRACE}; _pool_kill; }} |
{{ trap : TERM; exec 3<&-
  _pool_path=$PATH
  if [ -n "$_pool_line" ]; then eval "$(printf %b "$_pool_line")"; fi
  _pool_command=$1 _pool_root=
  shift 3
  _pool_said=
  for _pool_line do
    cd -P -- "$_pool_line" 2>/dev/null || {{ _pool_said=cwd; break; }}
    case "${{PWD%/}}/" in "${{_pool_root%/}}"/*) ;; *) _pool_said="escape $PWD"; break;; esac
    _pool_root=$PWD
  done
  [ -n "$_pool_said" ] || {{ ( exec /bin/sh -c "$_pool_command" ); _pool_said="exit $?"; }}
  exec </dev/null
  echo "$_pool_token $_pool_said" >&2
  exec >/dev/null 2>&1
  PATH=$_pool_path
  unset {MARK}  # or each grep would find itself
  _pool_kill; }}
"""

# What comes after the line of setup is for the command: kept in a file before it starts, so that the lifeline is free.
_TAKE_STDIN = f"""\
_pool_file=$(mktemp) && head -c {{size}} <&3 >"$_pool_file" && [ "$(($(wc -c <"$_pool_file")))" = {{size}} ] || {{{{
  rm -f -- "$_pool_file"; echo "{{token}} stdin" >&2; exit {_NOTICE_CODE}; }}}}
exec <"$_pool_file"; rm -f -- "$_pool_file"
"""

MAX_STDIN = 64 << 20
"""Bytes that a command may be given to read; more belongs into a file."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DURABLE = re.compile(r"[A-Za-z0-9_@:-][A-Za-z0-9_.@:-]{0,199}")


class ShellCommand:
    """One command, ready to be started: ``argv`` (or a `line` for a login shell) and a line of ``setup`` for stdin.

    It runs in the last of *folders*, each of which must be inside the one before, symlinks resolved.
    """

    _script = _SCRIPT

    def __init__(
        self, command: str, folders: Sequence[str], env: Mapping[str, str], token: str = "", stdin: bytes = b""
    ) -> None:
        self.folder = folders[-1]
        self.token = token or secrets.token_hex(8)
        self.setup = b""
        exports = _TAKE_STDIN.format(size=len(stdin), token=self.token) if stdin else ""
        exports += "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())
        quoted = shlex.quote(command)
        length = len(quoted.encode("utf-8", "surrogateescape"))
        if exports or length > _ARGUMENT_LIMIT or not _is_text(command + "".join(folders)):
            # Through stdin, where no `ps` shows it; escaped into one line for `read` and `printf %b`.
            script = f"{exports}set -- {shlex.join([command, self.token, '', *folders])}\n"
            self.setup = _escape(script.encode("utf-8", "surrogateescape")) + b"\n" + stdin
            command, folders = "", ()
        self._arguments = [command, self.token, "s" if self.setup else "", *folders]
        self.argv = ["/bin/sh", "-c", self._script, "pool", *self._arguments]

    def line(self, login_shell: str) -> str:
        """The command as text for the login shell of a remote user, whose name says whether it is a Bourne shell."""
        if login_shell in _BOURNE:
            return f"set -- {shlex.join(self._arguments)}\n{self._script}"
        return "exec " + shlex.join(self.argv)

    def raise_notice(self, exit_code: int, stderr: str) -> None:
        """Raise what the script found wrong before it started the command."""
        if exit_code != _NOTICE_CODE or self.token not in stderr:
            return
        what, _, where = stderr[stderr.index(self.token) + len(self.token) :].strip().partition(" ")
        if what == "cwd":
            raise FileOperationFailed.of(2, "cwd", self.folder, "no such folder, or not accessible")
        if what == "escape":
            raise PathEscapeError(f"cwd {self.folder!r} leaves its root through a symlink, to {where!r}")
        if what == "stdin":
            raise FileOperationFailed.of(5, "stdin of", "the command", "there is no room for it in a temporary file")


class PipedCommand(ShellCommand):
    """A process whose stdin and stdout are a byte stream; *env* and *command* end in the environment of no other.

    When its stdin ends it gets `EOF_GRACE` seconds, then TERM, and `KILL_GRACE` seconds later KILL, with its process
    group and everything in whose environment the token stands. The same when it ends by itself. *owner*: the first
    part of the mark, by which leftovers are known (`pool.backends.leftovers`).
    """

    _script = _PIPE_SCRIPT

    def __init__(self, argv: Sequence[str], folders: Sequence[str], env: Mapping[str, str], owner: str) -> None:
        token = secrets.token_hex(8)
        super().__init__(f"exec {shlex.join(argv)}", folders, {**env, MARK: f"{owner}.{token}"}, token)

    def exit_code(self, stderr: str) -> int | None:
        """What the process ended with, from the end of its stderr; None: it has not, or could not say so."""
        _, found, code = stderr.rpartition(f"{self.token} exit ")
        return int(code.split()[0]) if found and code.strip() else None

    def said(self, stderr: str) -> str:
        """*stderr* without what the script said."""
        return "".join(line for line in stderr.splitlines(keepends=True) if self.token not in line).strip()


def _is_text(text: str) -> bool:
    """Whether SSH can carry it, which knows UTF-8 only."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_command(command: Any) -> str:
    """Return *command*, or raise `ConfigError`."""
    if not isinstance(command, str):
        raise ConfigError(f"command={command!r}: must be text for /bin/sh, not {type(command).__name__}")
    if not command.strip():
        raise ConfigError("command is empty")
    if "\x00" in command:
        raise ConfigError(f"command={command[:80]!r}: must not contain a NUL character")
    if not encodable(command):
        raise ConfigError(f"command={command[:80]!r}: must not contain a lone surrogate")
    return command


def check_stdin(stdin: Any, encoding: str | None) -> bytes:
    """Return what a command is to read as bytes, or raise `ConfigError`."""
    if stdin is None:
        return b""
    if isinstance(stdin, str):
        try:
            stdin = stdin.encode(encoding or "utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise ConfigError(f"stdin: cannot be written in {encoding or 'utf-8'}: {error.reason}") from None
    if not isinstance(stdin, bytes | bytearray | memoryview):
        raise ConfigError(f"stdin: must be text or bytes, not {type(stdin).__name__}")
    if len(content := bytes(stdin)) > MAX_STDIN:
        raise ConfigError(f"stdin: has {len(content)} bytes, at most {MAX_STDIN}: write a file, and have it read that")
    return content


def check_durable(name: Any) -> str:
    """Return the name of a durable command, or raise `ConfigError`."""
    if not isinstance(name, str) or not _DURABLE.fullmatch(name):
        rule = "must be 1 to 200 letters, digits and . _ - @ :, not beginning with a dot"
        raise ConfigError(f"durable={name!r}: {rule}")
    return name


def check_env(env: Mapping[str, Any] | None) -> dict[str, str]:
    """Return *env* as names and texts, or raise `ConfigError` (the value is not shown: it may be a secret)."""
    checked = {}
    for name, value in (env or {}).items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"env name {name!r}: must be letters, digits and _, not starting with a digit")
        if not isinstance(value, str):
            raise ConfigError(f"env {name}: its value must be text, not {type(value).__name__}")
        if "\x00" in value:
            raise ConfigError(f"env {name}: its value must not contain a NUL character")
        if not encodable(value):
            raise ConfigError(f"env {name}: its value must not contain a lone surrogate")
        checked[name] = value
    return checked


_ESCAPES = [bytes([code]) if 0x20 <= code < 0x7F and code != 0x5C else b"\\0%03o" % code for code in range(256)]


def _escape(script: bytes) -> bytes:
    return b"".join([_ESCAPES[byte] for byte in script])
