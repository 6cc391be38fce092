"""The opencode server of a worker process: one for all its chats, started on first use, or one that runs elsewhere."""

import asyncio
import contextlib
import logging
import re
import secrets as random_secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from pool.backends.acp import check_argv
from pool.backends.base import Backend, Capabilities
from pool.backends.local import LocalFilesystemBackend
from pool.backends.opencode_events import EventStream
from pool.backends.process import PipedProcess
from pool.backends.secrets import check_secrets, read_secret, read_secrets
from pool.backends.shell import check_env
from pool.backends.weight import resident
from pool.config import check_number
from pool.errors import BackendUnavailable, ConfigError

logger = logging.getLogger(__name__)

_READY = re.compile(rb"listening on (http://\S+)")
_ATTEMPTS = 3
"""Starts, each on a port that was free a moment before, until it is given up."""
_PROBE_TIMEOUT = 5.0
"""Seconds for the server to say that it is well."""
_TICK = 5.0
"""Seconds between two looks after itself at least: sweeps come often."""
_KEPT = 4000

Handler = Callable[[dict[str, Any]], None]


class OpencodeServer(Backend):
    """``opencode serve``, started as *command* on a free port of 127.0.0.1 with a password of its own, or *url*.

    *env*, *secrets*: added to its environment. *password*: of the server at *url*, ``{"env": NAME}`` or
    ``{"file": PATH}``. Times in seconds: *start_timeout* until it must be ready; *hang_timeout*: a server that
    answers no probe, and reports no progress of any turn, for so long is ended; the next turn starts another.
    """

    kind = "opencode-server"
    capabilities = Capabilities()

    def __init__(
        self,
        command: Sequence[str] | None = None,
        *,
        url: str | None = None,
        password: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        secrets: Mapping[str, Mapping[str, str]] | None = None,
        start_timeout: float = 60.0,
        hang_timeout: float = 60.0,
    ) -> None:
        super().__init__()
        if (command is None) == (url is None):
            raise ConfigError("kind 'opencode' needs either command or url")
        if url is not None and not url.startswith(("http://", "https://")):
            raise ConfigError(f"url={url!r}: must begin with http:// or https://")
        if password is not None and url is None:
            raise ConfigError("password: only for a server at url; one that is started here gets its own")
        check_number("start_timeout", start_timeout, "must be more than 0")
        check_number("hang_timeout", hang_timeout, "must be more than 0")
        self.command = check_argv(command) if command is not None else None
        for option in ("--hostname", "--port"):  # given twice, opencode says no more than "Unexpected error"
            if any(word.partition("=")[0] == option for word in self.command or ()):
                raise ConfigError(f"command={command!r}: leave {option} out: it is added")
        self.url = url
        self._password = check_secrets({"password": password})["password"] if password is not None else None
        self._env = check_env(env)
        self._secrets = check_secrets(secrets or {})
        self._start_timeout, self._hang_timeout = start_timeout, hang_timeout
        self.open_timeout = start_timeout + 10.0
        self.version = ""
        self._client: Any = None  # httpx.AsyncClient
        self._process: PipedProcess | None = None
        self._home: LocalFilesystemBackend | None = None
        self._output = b""
        self._listening: asyncio.Task[None] | None = None
        self._streams: dict[str, EventStream] = {}
        self._handlers: dict[str, Handler] = {}  # of running turns, by session
        self._well_at = 0.0
        self._ticked_at = 0.0

    # -- life

    async def open(self) -> None:
        import httpx

        if self.command is None:
            password = read_secret("password", self._password) if self._password is not None else None
            base_url = str(self.url)
        else:
            password = random_secrets.token_urlsafe(32)
            base_url = await self._start(self.command, password)
        self._client = httpx.AsyncClient(
            base_url=base_url,
            auth=("opencode", password) if password is not None else None,
            timeout=httpx.Timeout(self._start_timeout, connect=_PROBE_TIMEOUT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # a proxy of the environment is not for this server
        )
        await self._greet()
        await self._weigh()

    async def _greet(self) -> None:
        """Probe it until it answers: a request that comes the moment it begins to listen is never answered."""
        deadline = monotonic() + self._start_timeout
        while True:
            try:
                return await self._probe()
            except BackendUnavailable as error:
                if error.reason != "timeout" or monotonic() > deadline:
                    raise

    async def _start(self, command: list[str], password: str) -> str:
        """Start the server; return its address. A port that somebody took in between costs another attempt."""
        env = {**self._env, **read_secrets(self._secrets), "OPENCODE_SERVER_PASSWORD": password}
        self._home = LocalFilesystemBackend(await asyncio.to_thread(tempfile.mkdtemp, prefix="pool-opencode-"))
        await self._home.connect()
        for attempt in range(_ATTEMPTS):
            place = ["--hostname", "127.0.0.1", "--port", str(_free_port())]
            self._process = process = await self._home.astart([*command, *place], env=env)
            address = await self._ready(process)
            if address:
                self._listening = asyncio.create_task(self._listen(process))
                return address
            why = await process.last_words()
            await process.close()
            if process.exit_code() != 1 or attempt == _ATTEMPTS - 1:
                raise self._unusable(f"{why}\n{self._output.decode(errors='replace')[-1000:]}".strip())
            logger.info("opencode server did not start on its port, once more: %s", why)
        raise AssertionError

    async def _ready(self, process: PipedProcess) -> str:
        """Return the address that it tells; "" when it ends before."""
        self._output = b""
        try:
            async with asyncio.timeout(self._start_timeout):
                while data := await process.receive():
                    self._output = (self._output + data)[-_KEPT:]
                    if found := _READY.search(self._output):
                        return found[1].decode()
        except TimeoutError:
            said = self._output.decode(errors="replace")
            raise self._unusable(f"not ready within {self._start_timeout:g} s\n{said}{process.tail()}") from None
        return ""

    async def _listen(self, process: PipedProcess) -> None:
        """Read on, so that it never waits for us, and notice its end."""
        while data := await process.receive():
            self._output = (self._output + data)[-_KEPT:]
        if self.usable:
            logger.warning("opencode server: %s", await process.last_words())
        self.mark_lost()

    def _unusable(self, why: str, reason: str = "setup") -> BackendUnavailable:
        name = self.command[0] if self.command is not None else self.url
        return BackendUnavailable(f"opencode server {name!r}: {why}", reason, None)

    async def _probe(self) -> None:
        """Ask whether it is well. Raises `BackendUnavailable`."""
        import httpx

        try:
            answer = await self._client.get("/global/health", timeout=_PROBE_TIMEOUT)
        except httpx.HTTPError as error:
            text = f"opencode server {self.url or self.command!r}: {str(error) or type(error).__name__}"
            reason = "timeout" if isinstance(error, httpx.TimeoutException) else "refused" if self.url else "lost"
            raise BackendUnavailable(text, reason, 0.0) from error
        if answer.status_code == 401:
            raise self._unusable("wrong password, or none", "login")
        if answer.status_code != 200:
            raise self._unusable(f"no opencode server there: HTTP {answer.status_code} {answer.text[:200]!r}")
        with contextlib.suppress(ValueError, AttributeError):
            self.version = f"opencode {answer.json().get('version', '')}".strip()
        self._well_at = monotonic()

    async def check(self) -> None:
        await self._probe()

    async def tick_health(self, now: float) -> None:
        """End a server that has hung; never one that still makes progress with a turn."""
        if now - self._ticked_at < _TICK or not self.usable:
            return
        self._ticked_at = now
        try:
            await self._probe()
        except BackendUnavailable as error:
            silent = monotonic() - max(self._well_at, *(stream.heard_at for stream in self._streams.values()), 0.0)
            logger.warning("opencode server does not answer (silent for %.0f s): %s", silent, error)
            if silent > self._hang_timeout:
                self.mark_lost()
                await self._end()
        else:
            await self._weigh()

    async def _weigh(self) -> None:
        pid = self._process.local_pid if self._process is not None else None
        self.weight = await asyncio.to_thread(resident, pid) if pid is not None else 0

    async def close(self) -> None:
        await self._end()
        home, self._home = self._home, None
        if home is not None:
            await home.adestroy()
            await asyncio.to_thread(shutil.rmtree, home.root, ignore_errors=True)

    async def _end(self) -> None:
        """End the process, the connections to it and whatever follows it."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            await stream.close()
        process, self._process = self._process, None
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.cancel()
        if process is not None:
            await process.close()
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    # -- what the backends of chats use

    @property
    def client(self) -> Any:
        """The HTTP client. Raises `BackendUnavailable` when the server is gone."""
        if self._client is None:
            raise BackendUnavailable("the opencode server is gone", "lost", 0.0)
        return self._client

    async def follow(self, directory: str) -> EventStream:
        """Return the stream of events of a project folder, connected; `unfollow` it."""
        stream = self._streams.get(directory)
        if stream is None:
            stream = self._streams[directory] = EventStream(self.client, directory, self._dispatch)
        stream.followers += 1
        await stream.connected(self._start_timeout)
        return stream

    async def unfollow(self, stream: EventStream) -> None:
        """Nobody else follows it: close it."""
        stream.followers -= 1
        if not stream.followers:
            if self._streams.get(stream.directory) is stream:
                del self._streams[stream.directory]
            await stream.close()

    @contextlib.contextmanager
    def turn(self, session_id: str, handler: Handler) -> Any:
        """Call *handler* with each event of a session, as long as a turn of it runs."""
        self._handlers[session_id] = handler
        try:
            yield
        finally:
            self._handlers.pop(session_id, None)

    def _dispatch(self, event: dict[str, Any]) -> None:
        properties = event.get("properties")
        session = properties.get("sessionID") if isinstance(properties, dict) else None
        handler = self._handlers.get(str(session))
        if handler is not None:
            handler(event)

    def is_busy(self) -> bool:
        """Whether a turn of any chat runs."""
        return bool(self._handlers)

    async def last_words(self) -> str:
        """How its process ended, as far as that is known."""
        return await self._process.last_words() if self._process is not None else "its connection was lost"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
