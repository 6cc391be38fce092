"""A coding agent that speaks the Agent Client Protocol: a process for each chat, on the worker or the chat's host."""

import asyncio
import importlib
import logging
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from pool.backends.acp_wire import LineTransport
from pool.backends.agent import AgentBackend
from pool.backends.base import BackendStatus
from pool.backends.permissions import Policy
from pool.backends.process import PipedProcess
from pool.backends.secrets import check_secrets, read_secrets
from pool.backends.shell import check_env
from pool.backends.site import Site
from pool.backends.turn import Collector, Session
from pool.backends.weight import resident
from pool.chats import Chat
from pool.config import check_number
from pool.errors import BackendUnavailable, ConfigError, FileOperationFailed, PathEscapeError, PoolError, TurnFailed

T = TypeVar("T")

logger = logging.getLogger(__name__)

_WEIGH_AGAIN = 10.0
"""Seconds until its memory is looked at again: that reads about every process of the machine."""
MAX_LINE = 8 << 20
"""Bytes of one message of an agent at most."""


class AcpBackend(AgentBackend):
    """The agent *command* (a list: program and arguments) of one *chat*.

    *where*, *root_dir*, *cwd*, *repository*, *base*: see `pool.backends.site.Site`. *env*, *secrets*: added to its
    environment. *permissions*: see `Policy.parse`. *auth_method*: id of the way to log in, for agents that want one.

    Times in seconds: *start_timeout* for the process to start and say hello, *session_timeout* for each request about
    a session, *cancel_timeout* for a cancelled turn to end. What takes longer is given up and the agent is ended; a
    chat never hangs. *max_line*: bytes of one message.
    """

    kind = "acp"

    def __init__(
        self,
        command: Sequence[str],
        *,
        chat: str = "",
        where: str = "worker",
        root_dir: str | None = None,
        cwd: str = ".",
        repository: str | None = None,
        base: str | None = None,
        env: Mapping[str, str] | None = None,
        secrets: Mapping[str, Mapping[str, str]] | None = None,
        permissions: str | Mapping[str, str] = "deny",
        auth_method: str | None = None,
        start_timeout: float = 30.0,
        session_timeout: float = 30.0,
        cancel_timeout: float = 5.0,
        max_line: int = MAX_LINE,
    ) -> None:
        super().__init__(cancel_timeout=cancel_timeout)
        self.command = check_argv(command)
        self.chat = chat
        self.site = Site(chat, where, root_dir, cwd, repository, base)
        self._env = check_env(env)
        self._secrets = check_secrets(secrets or {})
        self._policy = Policy.parse(permissions)
        self._auth_method = auth_method
        check_number("start_timeout", start_timeout, "must be more than 0")
        check_number("session_timeout", session_timeout, "must be more than 0")
        check_number("max_line", max_line, "must be more than 0", unit="bytes")
        self._start_timeout, self._session_timeout = start_timeout, session_timeout
        self.open_timeout = start_timeout + 60.0  # the host's connect and a checkout have limits of their own
        self._max_line = max_line
        self._process: PipedProcess | None = None
        self._transport: LineTransport | None = None
        self._sdk: Any = None
        self._client: Any = None
        self._connection: Any = None
        self._hello: Any = None
        self._session_id = ""
        self._weighed_at = 0.0

    # -- life

    async def open(self) -> None:
        await self.site.open(self.pool)
        await self._start()

    async def _start(self) -> None:
        """Start the process and say hello."""
        self._sdk = sdk = await _sdk()
        env = {**self._env, **read_secrets(self._secrets)}
        self._process = process = await self.site.folder.astart(self.command, env=env)
        self._transport = LineTransport(process, self._max_line, self._follower_is_full, self._lost)
        self._client = sdk.FolderClient(self.site.folder, self._policy)
        self._connection = sdk.connect(self._client, self._transport)
        try:
            self._hello = await self._start_request(sdk.initialize(self._connection, _own_version()), "initialize")
            self._check_version(self._hello.protocol_version, sdk.PROTOCOL_VERSION)
            if self._auth_method is not None:
                await self._start_request(self._connection.authenticate(method_id=self._auth_method), "authenticate")
        except BaseException:
            await self._end_process()
            raise
        await self._weigh()

    def _check_version(self, theirs: int, ours: int) -> None:
        if theirs != ours:
            raise self._unusable(f"it speaks version {theirs} of the protocol, not {ours}")

    async def _start_request(self, request: Awaitable[T], what: str) -> T:
        """Await an answer that must come before anything else; raise `BackendUnavailable` that a person can use."""
        try:
            async with asyncio.timeout(self._start_timeout):
                return await request
        except TimeoutError:
            raise self._unusable(f"no answer to {what} within {self._start_timeout:g} s", "timeout") from None
        except ConnectionError as error:
            raise await self._start_error() from error
        except PoolError:
            raise
        except Exception as error:
            raise self._unusable(f"it refuses {what}: {_said(error)}") from error

    async def _start_error(self) -> PoolError:
        """Say why a process that has just been started is gone."""
        if self.site.lost:
            return BackendUnavailable(f"agent {self.command[0]!r}: the connection to its host was lost", "lost", 0.0)
        assert self._process is not None
        assert self._transport is not None
        how = self._transport.fault or await self._process.last_words()
        try:
            self._process.raise_notice()
        except (FileOperationFailed, PathEscapeError) as error:
            return error
        return self._unusable(how)

    def _unusable(self, why: str, reason: str = "setup") -> BackendUnavailable:
        """Only a person can help with an agent that does not start; the next turn tries again."""
        said = self._process.tail() if self._process is not None else ""
        garbage = self._transport.garbage.strip() if self._transport is not None else ""
        told = "".join(f"\n{text[-1000:]}" for text in (said, garbage) if text and text not in why)
        return BackendUnavailable(f"agent {self.command[0]!r}: {why}{told}", reason, None)

    def _lost(self) -> None:
        """Its process has ended, or talks nonsense: the next acquire starts another."""
        self.mark_lost()

    def _follower_is_full(self, resume: Any) -> bool:
        collector = self._client.collector if self._client is not None else None
        return collector is not None and collector.full(resume)

    async def check(self) -> None:
        """Its process runs, and its host is connected; a protocol without a ping has no more to ask."""
        if self._process is None or self.site.lost:
            raise BackendUnavailable(f"agent {self.command[0]!r} is gone", "lost", 0.0)

    async def tick_health(self, now: float) -> None:
        if now - self._weighed_at >= _WEIGH_AGAIN:  # sweeps come more often
            self._weighed_at = now
            await self._weigh()

    async def _weigh(self) -> None:
        pid = self._process.local_pid if self._process is not None else None
        self.weight = await asyncio.to_thread(resident, pid) if pid is not None else 0

    async def close(self) -> None:
        try:
            await self._end_process()
        finally:
            await self.site.leave()

    async def _end_process(self) -> None:
        connection, self._connection = self._connection, None
        client, self._client = self._client, None
        process, self._process = self._process, None
        self._session_id = ""
        try:
            if connection is not None:
                await connection.close()
            if client is not None:
                await client.terminals.close()
        finally:
            if process is not None:
                await process.close()

    # -- the session

    async def _ensure_session(self, chat: Chat) -> Session:
        if self._connection is None:
            raise BackendUnavailable(f"agent {self.command[0]!r} was ended: another is started", "lost", 0.0)
        if chat.session_id and chat.session_id == self._session_id:
            return self._session()
        lost = bool(chat.session_id)
        if chat.session_id:
            if await self._bring_back(chat.session_id):
                return self._session(resumed=True)
            logger.warning("chat %r: session %r cannot be brought back: it begins anew", chat.chat, chat.session_id)
        response = await self._session_request(
            self._connection.new_session(cwd=self.site.folder_path, mcp_servers=[]), "session/new"
        )
        self._use(response.session_id)
        return self._session(memory_lost=lost)

    def _session(self, *, resumed: bool = False, memory_lost: bool = False) -> Session:
        info = self._hello.agent_info
        worktree = self.site.worktree
        return Session(
            self._session_id,
            resumed,
            memory_lost,
            f"{info.name} {info.version}" if info is not None else "",
            worktree.path if worktree is not None else "",
            worktree.branch if worktree is not None else "",
        )

    def _use(self, session_id: str) -> None:
        self._session_id = self._client.session_id = session_id

    async def _bring_back(self, session_id: str) -> bool:
        """Have the agent take up an old session, by what it says that it can do. False: it cannot."""
        can = self._hello.agent_capabilities
        if can is not None and can.session_capabilities is not None and can.session_capabilities.resume is not None:
            bring = self._connection.resume_session
        elif can is not None and can.load_session:
            bring = self._connection.load_session
        else:
            return False
        request = bring(cwd=self.site.folder_path, session_id=session_id, mcp_servers=[])
        try:
            async with asyncio.timeout(self._session_timeout):
                await request
        except (TimeoutError, ConnectionError) as error:  # it may hang for good, and whatever is asked next as well
            logger.warning("chat %r: bringing back its session failed: %r", self.chat, error)
            if self.site.lost:
                raise BackendUnavailable("the connection to the agent's host was lost", "lost", 0.0) from error
            await self._end_process()
            await self._start()
            self._set_status(BackendStatus.CONNECTED)  # the end of the one before may have been noticed
            return False
        except Exception as error:
            logger.info("chat %r: its session was not brought back: %s", self.chat, _said(error))
            return False
        self._use(session_id)
        return True

    async def _session_request(self, request: Awaitable[T], what: str) -> T:
        try:
            async with asyncio.timeout(self._session_timeout):
                return await request
        except TimeoutError:
            self.mark_lost()
            raise self._unusable(f"no answer to {what} within {self._session_timeout:g} s", "timeout") from None
        except ConnectionError as error:
            raise await self._start_error() from error
        except Exception as error:
            raise self._unusable(f"it refuses {what}: {_said(error)}") from error

    async def _close_session(self, chat: Chat) -> None:
        """Tell the agent, if it runs and knows how; what it keeps on its disk is its own."""
        if self._connection is None or chat.session_id != self._session_id:
            return
        can = self._hello.agent_capabilities
        if can is not None and can.session_capabilities is not None and can.session_capabilities.close is not None:
            await self._session_request(self._connection.close_session(session_id=chat.session_id), "session/close")
        self._session_id = ""

    async def _forget(self, chat: Chat) -> dict[str, Any]:  # noqa: ARG002
        report = await self.site.clear_away(self.pool)
        return {"worktree": report} if report is not None else {}

    # -- a turn

    async def _prompt(self, text: str, collector: Collector) -> str:
        sdk = self._sdk
        client, connection, process = self._client, self._connection, self._process
        if connection is None or process is None or not self._session_id:
            raise ConfigError("call ensure_session before prompt")
        client.collector = collector
        try:
            response = await connection.prompt(session_id=self._session_id, prompt=[sdk.text_block(text)])
        except ConnectionError as error:
            raise await self._turn_error(process) from error
        except sdk.RequestError as error:
            raise TurnFailed(f"agent {self.command[0]!r}: {_said(error)}", "refused", process.tail()) from error
        except Exception as error:
            text = f"agent {self.command[0]!r}: its answer breaks the protocol: {_said(error)}"
            raise TurnFailed(text, "garbage", process.tail()) from error
        finally:
            client.collector = None
        usage = sdk.usage_of(response)
        if usage is not None:
            collector.usage = {**(collector.usage or {}), **usage}
        return str(response.stop_reason)

    async def _turn_error(self, process: PipedProcess) -> PoolError:
        self.mark_lost()
        if self.site.lost:
            return BackendUnavailable(f"agent {self.command[0]!r}: the connection to its host was lost", "lost", 0.0)
        if self._transport is not None and self._transport.fault:
            return TurnFailed(f"agent {self.command[0]!r}: {self._transport.fault}", "garbage", process.tail())
        return TurnFailed(f"agent {self.command[0]!r} died: {await process.last_words()}", "died", process.tail())

    async def _cancel(self) -> None:
        if self._connection is not None:
            await self._connection.cancel(session_id=self._session_id)

    async def _abandon(self) -> None:
        await self._end_process()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.command[0]!r} of {self.chat!r} {self.status}>"


def check_argv(command: Any) -> list[str]:
    """Return *command*, or raise `ConfigError`."""
    words = isinstance(command, Sequence) and not isinstance(command, str)
    if not words or not command or not all(isinstance(word, str) and word for word in command):
        raise ConfigError(f"command={command!r}: must be a list: the program and its arguments")
    if any("\x00" in word for word in command):
        raise ConfigError("command: must not contain a NUL character")
    return list(command)


async def _sdk() -> Any:
    """Our half of the protocol; the first time it is imported beside the event loop, which a second would hold up."""
    return await asyncio.to_thread(importlib.import_module, "pool.backends.acp_client")


def _own_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("celery-warm-pool")
    except metadata.PackageNotFoundError:
        return "0"


def _said(error: Exception) -> str:
    """What an agent answered, with the details that it gave; or what is wrong with it, without pydantic's address."""
    if hasattr(error, "errors"):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
    data = getattr(error, "data", None)
    details = data.get("details", data) if isinstance(data, Mapping) else data
    return f"{error} ({details})" if details else f"{error or type(error).__name__}"
