"""The client's side of the Agent Client Protocol: what an agent may ask of us, bound to its folder.

Imported when the first agent is started: the SDK and pydantic take a second.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from acp import PROTOCOL_VERSION, Client, RequestError, connect_to_agent, text_block
from acp.client.connection import ClientSideConnection
from acp.schema import (
    AllowedOutcome,
    ClientCapabilities,
    CreateTerminalResponse,
    DeniedOutcome,
    FileSystemCapabilities,
    Implementation,
    InitializeResponse,
    KillTerminalResponse,
    PromptResponse,
    ReadTextFileResponse,
    ReleaseTerminalResponse,
    RequestPermissionResponse,
    TerminalExitStatus,
    TerminalOutputResponse,
    WaitForTerminalExitResponse,
    WriteTextFileResponse,
)

from pool.backends.permissions import Policy
from pool.backends.scoped import ScopedBackend
from pool.backends.terminals import Terminals
from pool.backends.turn import Collector
from pool.errors import FileMissing, PoolError

__all__ = ["PROTOCOL_VERSION", "FolderClient", "PromptResponse", "RequestError", "connect", "initialize", "text_block"]


class FolderClient:
    """Answers an agent that works in *folder*, by *policy*. ``collector`` takes the reports of the running turn."""

    def __init__(self, folder: ScopedBackend, policy: Policy) -> None:
        self.folder = folder
        self.policy = policy
        self.terminals = Terminals()
        self.session_id = ""
        self.collector: Collector | None = None  # None: no turn runs, reports are of the past

    # -- reports

    async def session_update(self, session_id: str, update: Any, **_: Any) -> None:
        """Take what the agent reports, if it concerns the running turn."""
        collector = self.collector
        if collector is None or session_id != self.session_id:
            return
        kind = update.session_update
        if kind == "agent_message_chunk":
            if update.content.type == "text":
                collector.say(update.content.text)
        elif kind == "agent_thought_chunk":
            if update.content.type == "text":
                collector.report({"type": "thought", "text": update.content.text})
        elif kind in ("tool_call", "tool_call_update"):
            fields = {"title": update.title, "kind": update.kind, "status": update.status}
            collector.tool(update.tool_call_id, fields)
        elif kind == "usage_update":
            collector.usage = {**(collector.usage or {}), **_plain(update)}
        else:
            collector.report({"type": kind})

    async def request_permission(
        self, session_id: str, tool_call: Any, options: list[Any], **_: Any
    ) -> RequestPermissionResponse:
        """Answer by the policy; the result of the turn names it."""
        collector = self.collector
        kind = tool_call.kind or (collector and collector.kind_of(tool_call.tool_call_id)) or "other"
        chosen = None
        if collector is not None and session_id == self.session_id:
            chosen = self.policy.choose(kind, [(option.option_id, option.kind) for option in options])
            allowed = self.policy.answer(kind) == "allow" and chosen is not None
            collector.permission(tool_call.title or "", kind, "allow" if allowed else "deny")
        if chosen is None:
            return RequestPermissionResponse(outcome=DeniedOutcome(outcome="cancelled"))
        return RequestPermissionResponse(outcome=AllowedOutcome(outcome="selected", option_id=chosen))

    # -- files

    async def read_text_file(
        self, session_id: str, path: str, line: int | None = None, limit: int | None = None, **_: Any
    ) -> ReadTextFileResponse:
        """Return a file of the folder; *limit* lines from the *line*-th on."""
        with _told():
            content: str = await self.folder.aread(path)
        if line is not None or limit is not None:
            start = max(0, (line or 1) - 1)
            lines = content.splitlines(keepends=True)
            content = "".join(lines[start : None if limit is None else start + limit])
        return ReadTextFileResponse(content=content)

    async def write_text_file(self, session_id: str, path: str, content: str, **_: Any) -> WriteTextFileResponse:
        """Write a file of the folder."""
        with _told():
            await self.folder.awrite(path, content)
        return WriteTextFileResponse()

    # -- terminals

    async def create_terminal(
        self,
        session_id: str,
        command: str,
        args: list[str] | None = None,
        env: list[Any] | None = None,
        cwd: str | None = None,
        output_byte_limit: int | None = None,
        **_: Any,
    ) -> CreateTerminalResponse:
        """Start a command in the folder."""
        variables = {each.name: each.value for each in env or ()}
        with _told():
            return CreateTerminalResponse(
                terminal_id=self.terminals.create(
                    self.folder, [command, *(args or ())], cwd, variables, output_byte_limit
                )
            )

    async def terminal_output(self, session_id: str, terminal_id: str, **_: Any) -> TerminalOutputResponse:
        """Return what it has written so far."""
        with _told():
            terminal = self.terminals.find(terminal_id)
        status = TerminalExitStatus(exit_code=terminal.exit_code) if terminal.ended else None
        return TerminalOutputResponse(output=terminal.output, truncated=terminal.truncated, exit_status=status)

    async def wait_for_terminal_exit(self, session_id: str, terminal_id: str, **_: Any) -> WaitForTerminalExitResponse:
        """Return when the command has ended."""
        with _told():
            terminal = self.terminals.find(terminal_id)
        await terminal.wait()
        return WaitForTerminalExitResponse(exit_code=terminal.exit_code)

    async def kill_terminal(self, session_id: str, terminal_id: str, **_: Any) -> KillTerminalResponse:
        """End the command; its output can still be read."""
        with _told():
            await self.terminals.find(terminal_id).kill()
        return KillTerminalResponse()

    async def release_terminal(self, session_id: str, terminal_id: str, **_: Any) -> ReleaseTerminalResponse:
        """End the command, and forget it."""
        with _told():
            await self.terminals.release(terminal_id)
        return ReleaseTerminalResponse()

    async def ext_method(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Know no extensions."""
        raise RequestError.method_not_found(method)

    async def ext_notification(self, method: str, params: dict[str, Any]) -> None:
        """Ignore extensions."""

    def on_connect(self, conn: Any) -> None:
        """Need nothing of the connection."""


def connect(client: FolderClient, transport: Any) -> ClientSideConnection:
    """Return the SDK's connection over *transport*."""
    from typing import cast

    return connect_to_agent(cast(Client, client), transport)


async def initialize(connection: ClientSideConnection, version: str) -> InitializeResponse:
    """Say hello."""
    return await connection.initialize(
        protocol_version=PROTOCOL_VERSION,
        client_capabilities=ClientCapabilities(
            fs=FileSystemCapabilities(read_text_file=True, write_text_file=True), terminal=True
        ),
        client_info=Implementation(name="celery-warm-pool", version=version),
    )


def usage_of(response: PromptResponse) -> dict[str, Any] | None:
    """The tokens that an agent tells at the end of a turn."""
    return _plain(response.usage) if response.usage is not None else None


def _plain(model: Any) -> dict[str, Any]:
    """A message as JSON, without what every message of its kind has."""
    found: dict[str, Any] = model.model_dump(mode="json", exclude_none=True, exclude={"session_update", "field_meta"})
    return found


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Our errors as the protocol has them."""
    try:
        yield
    except FileMissing as error:
        raise RequestError.resource_not_found(str(error)) from error
    except PoolError as error:
        raise RequestError.invalid_params({"details": str(error)}) from error
