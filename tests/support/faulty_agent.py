"""A coding agent that speaks ACP: a good citizen that echoes and remembers, until a flag or a prompt tells it otherwise.

Run as ``python -m tests.support.faulty_agent --store FOLDER [flags]``, or as a file. Its sessions are JSON files in the
store, so that another process of it can load them. The prompts that make it misbehave stand at `ORDERS`; besides them
it knows what `pool.demo.llm.answer` knows, and answers anything else in the same way:
``turn N: <text>; earlier: [<text>, ...]``.

Python starts it in a moment and imports the SDK, which takes a second, only after the faults of its start.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEGABYTE = 1 << 20
FORKS = ("plain", "setsid", "stubborn", "daemon")
_GARBAGE = "this is a log line, not a message"


def main() -> None:
    flags = _flags()
    if flags.stubborn:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    _start(flags)
    die(flags, "start")
    asyncio.run(_serve(flags))
    while flags.stubborn:
        time.sleep(1)


def _start(flags: argparse.Namespace) -> None:
    """Do what it does before it listens."""
    with (flags.store / "started").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    for kind in flags.fork:
        fork(kind, flags.store)
    if flags.stderr:
        flood_stderr(flags.stderr)
    for _ in range(flags.garbage):
        print(_GARBAGE, flush=True)
    time.sleep(flags.slow_start)
    while flags.garbage_forever:
        print(_GARBAGE)
    while flags.line_forever:
        sys.stdout.write("x" * 65536)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--store", type=Path, required=True, help="folder of the sessions, and of ``started``: its process ids"
    )
    parser.add_argument("--load", action="store_true", help="can load sessions, and replays them")
    parser.add_argument("--resume", action="store_true", help="can resume sessions")
    parser.add_argument("--close", action="store_true", help="can close sessions")
    parser.add_argument("--slow-start", type=float, default=0, help="seconds")
    steps = ("initialize", "authenticate", "new", "load", "resume", "prompt", "close")
    parser.add_argument("--hang", choices=steps, action="append", default=[])
    parser.add_argument("--refuse", choices=steps, action="append", default=[], help="answer with an error")
    parser.add_argument("--exit", choices=("start", *steps), action="append", default=[], help="exit 3 there")
    parser.add_argument("--kill", choices=("start", *steps), action="append", default=[], help="SIGKILL itself there")
    parser.add_argument("--protocol", type=int, help="the version that it says to speak")
    parser.add_argument("--garbage", type=int, default=0, help="lines that are no messages, before it begins")
    parser.add_argument("--garbage-forever", action="store_true")
    parser.add_argument("--line-forever", action="store_true", help="write a line that does not end")
    parser.add_argument("--stderr", type=int, default=0, help="megabytes to say on stderr")
    parser.add_argument("--ignore-cancel", action="store_true")
    parser.add_argument("--stubborn", action="store_true", help="ignore TERM and the end of stdin")
    parser.add_argument("--fork", choices=FORKS, action="append", default=[])
    return parser.parse_args()


def die(flags: argparse.Namespace, where: str) -> None:
    """Crash, if that was asked for."""
    if where in flags.exit:
        print(f"no luck at {where}", file=sys.stderr, flush=True)
        os._exit(3)
    if where in flags.kill:
        print(f"killed at {where}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def fork(kind: str, store: Path) -> None:
    """Start a process that would like to outlive us; it holds our stdout and stderr, and adds its id to ``pids``."""
    ignore = "" if kind in {"plain", "setsid"} else "trap '' TERM HUP INT; "
    script = f"{ignore}echo $$ >> {shlex.quote(str(store / 'pids'))}; while :; do sleep 1; done"
    command = ["sh", "-c", script]
    if kind == "daemon":  # nobody's child, in a session of its own
        subprocess.run(["sh", "-c", 'setsid "$@" &', "daemon", *command], stdin=subprocess.DEVNULL, check=True)
    else:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=kind == "setsid")


def flood_stderr(megabytes: int) -> None:
    for _ in range(megabytes * 16):
        sys.stderr.write(("y" * 63 + "\n") * 1024)
    print("the end of the flood", file=sys.stderr, flush=True)


async def _serve(flags: argparse.Namespace) -> None:
    global acp, schema
    import acp
    from acp import schema
    from acp.agent.connection import AgentSideConnection
    from acp.stdio import stdio_streams

    reader, writer = await stdio_streams(limit=50 * MEGABYTE)
    agent = FaultyAgent(flags, writer)
    connection = AgentSideConnection(agent, writer, reader, listening=False, use_unstable_protocol=True)
    try:
        await connection.listen()
    finally:
        await connection.close()


class FaultyAgent:
    """The agent's side of the protocol."""

    def __init__(self, flags: argparse.Namespace, writer: asyncio.StreamWriter) -> None:
        self.flags = flags
        self.writer = writer
        self.client: Any = None
        self.cwd = ""
        self.cancelled = asyncio.Event()
        self.background: set[asyncio.Task[None]] = set()

    def on_connect(self, connection: Any) -> None:
        self.client = connection

    async def _at(self, step: str) -> None:
        """Do the faults of a step."""
        die(self.flags, step)
        if step in self.flags.refuse:
            raise acp.RequestError.internal_error({"details": f"no {step} today"})
        if step in self.flags.hang:
            await asyncio.Event().wait()

    # -- sessions

    async def initialize(self, protocol_version: int, **_: Any) -> Any:
        await self._at("initialize")
        can = schema.SessionCapabilities(
            resume=schema.SessionResumeCapabilities() if self.flags.resume else None,
            close=schema.SessionCloseCapabilities() if self.flags.close else None,
        )
        return schema.InitializeResponse(
            protocol_version=self.flags.protocol or protocol_version,
            agent_capabilities=schema.AgentCapabilities(load_session=self.flags.load, session_capabilities=can),
            agent_info=schema.Implementation(name="faulty", version="1.0"),
        )

    async def authenticate(self, method_id: str, **_: Any) -> Any:
        await self._at("authenticate")
        if method_id != "key":
            raise acp.RequestError.invalid_params({"details": f"there is no way {method_id!r} to log in"})
        return schema.AuthenticateResponse()

    async def new_session(self, cwd: str, **_: Any) -> Any:
        await self._at("new")
        self.cwd = cwd
        session_id = uuid.uuid4().hex
        self._file(session_id).write_text("[]", encoding="utf-8")
        return schema.NewSessionResponse(session_id=session_id)

    async def load_session(self, cwd: str, session_id: str, **_: Any) -> Any:
        await self._at("load")
        self.cwd = cwd
        for text in self._texts(session_id):  # as the protocol has it
            await self.client.session_update(session_id, acp.update_user_message_text(text))
            await self.client.session_update(session_id, acp.update_agent_message_text("said before"))
        return schema.LoadSessionResponse()

    async def resume_session(self, cwd: str, session_id: str, **_: Any) -> Any:
        await self._at("resume")
        self.cwd = cwd
        self._texts(session_id)
        return schema.ResumeSessionResponse()

    async def close_session(self, session_id: str, **_: Any) -> Any:
        await self._at("close")
        self._texts(session_id)
        self._file(session_id).unlink()
        return schema.CloseSessionResponse()

    async def cancel(self, session_id: str, **_: Any) -> None:
        if not self.flags.ignore_cancel:
            self.cancelled.set()

    def _file(self, session_id: str) -> Path:
        folder: Path = self.flags.store
        return folder / f"{session_id}.json"

    def _texts(self, session_id: str) -> list[str]:
        try:
            texts: list[str] = json.loads(self._file(session_id).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise acp.RequestError.resource_not_found(session_id) from None
        return texts

    # -- turns

    async def prompt(self, session_id: str, prompt: list[Any], **_: Any) -> Any:
        text = "".join(block.text for block in prompt)
        earlier = self._texts(session_id)
        self._file(session_id).write_text(json.dumps([*earlier, text]), encoding="utf-8")
        self.cancelled.clear()
        working = asyncio.ensure_future(self._answer(session_id, text, earlier))
        cancelling = asyncio.ensure_future(self.cancelled.wait())
        await asyncio.wait({working, cancelling}, return_when=asyncio.FIRST_COMPLETED)
        cancelling.cancel()
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.wait({working})
        return schema.PromptResponse(stop_reason="cancelled")

    async def _answer(self, session_id: str, text: str, earlier: list[str]) -> Any:
        await self._at("prompt")
        order, _, rest = text[1:].partition(" ")
        if text[:1] in {"!", "/"} and order in ORDERS:
            response = await getattr(self, f"_do_{order}")(session_id, rest)
            return response if response is not None else schema.PromptResponse(stop_reason="end_turn")
        await self.say(session_id, f"turn {len(earlier) + 1}: {text}; earlier: [{', '.join(earlier)}]")
        return schema.PromptResponse(stop_reason="end_turn")

    async def say(self, session_id: str, text: str) -> None:
        await self.client.session_update(session_id, acp.update_agent_message_text(text))

    async def drain(self) -> None:
        """Shielded: the SDK's stream never gets over a cancelled drain."""
        await asyncio.shield(self.writer.drain())

    async def told(self, session_id: str, call: Any) -> None:
        """Say what a request brought, or the error."""
        try:
            answer = await call
        except acp.RequestError as error:
            await self.say(session_id, f"error {error.code}: {error} {json.dumps(error.data)}")
        else:
            await self.say(session_id, getattr(answer, "content", None) or "done")

    async def _do_slow(self, session_id: str, rest: str) -> None:
        seconds, _, text = rest.partition(" ")
        for word in text.split():
            await self.say(session_id, f"{word} ")
            await asyncio.sleep(float(seconds) / len(text.split()))

    async def _do_hang(self, session_id: str, _: str) -> None:
        await self.say(session_id, "it hangs")
        await asyncio.Event().wait()

    async def _do_tool(self, session_id: str, command: str) -> None:
        call_id = uuid.uuid4().hex
        start = acp.start_tool_call(call_id, command, kind="execute", status="pending")
        await self.client.session_update(session_id, start)
        if not await self._allowed(session_id, call_id, None, command):
            await self.client.session_update(session_id, acp.update_tool_call(call_id, status="failed"))
            await self.say(session_id, "tool said: refused")
            return
        made = await self.client.create_terminal(session_id=session_id, command="sh", args=["-c", command])
        await self.client.wait_for_terminal_exit(session_id=session_id, terminal_id=made.terminal_id)
        output = await self.client.terminal_output(session_id=session_id, terminal_id=made.terminal_id)
        await self.client.release_terminal(session_id=session_id, terminal_id=made.terminal_id)
        await self.client.session_update(session_id, acp.update_tool_call(call_id, status="completed"))
        await self.say(session_id, f"tool said: {output.output}")

    async def _allowed(self, session_id: str, call_id: str, kind: Any, title: str) -> bool:
        options = [
            schema.PermissionOption(option_id=name, name=name, kind=name)
            for name in ("allow_always", "allow_once", "reject_once", "reject_always")
        ]
        answer = await self.client.request_permission(
            session_id=session_id,
            tool_call=schema.ToolCallUpdate(tool_call_id=call_id, kind=kind, title=title),
            options=options,
        )
        return answer.outcome.outcome == "selected" and answer.outcome.option_id.startswith("allow")

    async def _do_ask(self, session_id: str, rest: str) -> None:
        answers = [f"{kind}={await self._allowed(session_id, kind, kind, f'to {kind}')}" for kind in rest.split()]
        await self.say(session_id, " ".join(answers))

    async def _do_ask_without_options(self, session_id: str, _: str) -> None:
        call = schema.ToolCallUpdate(tool_call_id="1", kind="edit", title="odd")
        answer = await self.client.request_permission(session_id=session_id, tool_call=call, options=[])
        await self.say(session_id, answer.outcome.outcome)

    async def _do_error(self, _session_id: str, rest: str) -> None:
        raise acp.RequestError(-32000, "told to fail", {"details": rest or "no reason"})

    async def _do_invalid(self, _session_id: str, _: str) -> Any:
        return {"usage": "none of your business"}

    async def _do_exit(self, session_id: str, _: str) -> None:
        await self.say(session_id, "its last words")
        await self.drain()
        print("Traceback: it crashed", file=sys.stderr, flush=True)
        os._exit(3)

    async def _do_kill(self, session_id: str, _: str) -> None:
        await self.say(session_id, "its last words")
        os.kill(os.getpid(), signal.SIGKILL)

    async def _do_garbage(self, session_id: str, count: str) -> None:
        for _ in range(int(count)):
            self.writer.write(f"{_GARBAGE}\n".encode())
        self.writer.write(b'[1, 2]\n\n{"neither": "nor"}\n"text"\n\xff\xfe\n')
        await self.drain()
        await self.say(session_id, "it went on")

    async def _do_malformed(self, _session_id: str, _: str) -> None:
        """Almost messages: their parts are of the wrong types, or nested without end."""
        for _ in range(1001):
            self.writer.write(b'{"id": [1], "result": 1}\n{"id": 1, "error": 5}\n{"id": 2, "method": {}}\n')
        self.writer.write(b'{"method": ' + b"[" * 100_000 + b"\n")
        await self.drain()
        await asyncio.Event().wait()

    async def _do_garbage_forever(self, _session_id: str, _: str) -> None:
        while True:
            self.writer.write(f"{_GARBAGE}\n".encode())
            await self.drain()

    async def _do_line(self, session_id: str, megabytes: str) -> None:
        self.writer.write(b"x" * (int(megabytes) * MEGABYTE) + b"\n")
        await self.drain()
        await self.say(session_id, "it went on")

    async def _do_message(self, session_id: str, megabytes: str) -> None:
        await self.say(session_id, "z" * (int(megabytes) * MEGABYTE))

    async def _do_stderr(self, session_id: str, megabytes: str) -> None:
        flood_stderr(int(megabytes))
        await self.say(session_id, "it went on")

    async def _do_fork(self, session_id: str, kinds: str) -> None:
        for kind in kinds.split():
            await asyncio.to_thread(fork, kind, self.flags.store)
        await self.say(session_id, "forked")

    async def _do_read(self, session_id: str, path: str) -> None:
        path = path.replace("HERE", self.cwd)
        await self.told(session_id, self.client.read_text_file(session_id=session_id, path=path))

    async def _do_lines(self, session_id: str, path: str) -> None:
        await self.told(session_id, self.client.read_text_file(session_id=session_id, path=path, line=2, limit=1))

    async def _do_write(self, session_id: str, rest: str) -> None:
        path, _, content = rest.replace("HERE", self.cwd).partition(" ")
        await self.told(session_id, self.client.write_text_file(session_id=session_id, path=path, content=content))

    async def _do_terminal(self, session_id: str, command: str) -> None:
        """Start it in a terminal, wait until it said something, kill it, look, release, look again."""
        made = await self.client.create_terminal(session_id=session_id, command=command, output_byte_limit=1000)
        found = {"session_id": session_id, "terminal_id": made.terminal_id}
        while not (output := await self.client.terminal_output(**found)).output:
            await asyncio.sleep(0.01)
        running = output.exit_status is None
        await self.client.kill_terminal(**found)
        exit_code = (await self.client.wait_for_terminal_exit(**found)).exit_code
        after = (await self.client.terminal_output(**found)).output
        await self.client.release_terminal(**found)
        await self.say(session_id, json.dumps({"running": running, "exit_code": exit_code, "output": after}))
        await self.told(session_id, self.client.terminal_output(**found))

    async def _do_terminal_in(self, session_id: str, cwd: str) -> None:
        made = await self.client.create_terminal(session_id=session_id, command="pwd", cwd=cwd or self.cwd)
        found = {"session_id": session_id, "terminal_id": made.terminal_id}
        exit_code = (await self.client.wait_for_terminal_exit(**found)).exit_code
        await self.say(session_id, f"{exit_code}: {(await self.client.terminal_output(**found)).output}")

    async def _do_terminals(self, session_id: str, count: str) -> None:
        """Start many and release none."""
        for _ in range(int(count)):
            call = self.client.create_terminal(session_id=session_id, command="echo $$ >> terminals; exec sleep 1000")
            await self.told(session_id, call)

    async def _do_reports(self, session_id: str, _: str) -> None:
        usage = schema.UsageUpdate(session_update="usage_update", used=7, size=100)
        for update in (
            acp.update_agent_thought_text("hm"),
            acp.update_plan([acp.plan_entry("think")]),
            acp.start_tool_call("call", "Look", kind="read", status="pending"),
            acp.update_agent_message_text("here"),
            acp.update_tool_call("call", status="completed"),
            usage,
        ):
            await self.client.session_update(session_id, update)
        tokens = schema.Usage(total_tokens=3, input_tokens=1, output_tokens=2)
        return schema.PromptResponse(stop_reason="max_tokens", usage=tokens)

    async def _do_late(self, session_id: str, _: str) -> None:
        """Report when the turn has ended; ``late`` is made when the client has seen it."""

        async def later() -> None:
            await asyncio.sleep(0.2)
            await self.say(session_id, "too late")
            await self.client.write_text_file(session_id=session_id, path="late", content="")

        task = asyncio.create_task(later())
        self.background.add(task)
        await self.say(session_id, "in time")

    async def _do_other(self, session_id: str, _: str) -> None:
        await self.say("another session", "not for you")
        await self.say(session_id, "for you")

    async def _do_ext(self, session_id: str, _: str) -> None:
        await self.client.ext_notification("example/note", {})
        await self.told(session_id, self.client.ext_method("example/unknown", {}))

    async def _do_elicit(self, session_id: str, _: str) -> None:
        call = self.client._conn.send_request("elicitation/create", {"sessionId": session_id, "message": "?"})
        await self.told(session_id, call)

    async def _do_updates(self, session_id: str, count: str) -> None:
        """Written by hand: the SDK takes minutes for a million."""
        update = {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": "a"}}
        params = {"sessionId": session_id, "update": update}
        message = {"jsonrpc": "2.0", "method": "session/update", "params": params}
        lines = (json.dumps(message, separators=(",", ":")) + "\n").encode() * 1000
        for _ in range(int(count) // 1000):
            self.writer.write(lines)
            await self.drain()


def _orders() -> Iterator[str]:
    return (name.removeprefix("_do_") for name in vars(FaultyAgent) if name.startswith("_do_"))


ORDERS = frozenset(_orders())
"""Prompts ``!order ...`` that make it do something else than echo: each is the method ``_do_order``."""

if __name__ == "__main__":
    main()
