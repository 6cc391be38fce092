"""The least that an ACP agent can be: it echoes, and remembers in files. What it takes is what the protocol takes.

Run as a file, with nothing but Python: ``python echo_agent.py STORE [--fork KIND ...]``. ``STORE/ledger`` gets a line
``begin PID PROMPT`` and ``end PID PROMPT`` for each turn, ``STORE/pids`` the id of each process that was started.
``/slow SECONDS`` and ``/hang`` take that long.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

FORKS = ("plain", "setsid", "daemon")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--fork", choices=FORKS, action="append", default=[], help="start something that stays")
    options = parser.parse_args()
    _note(options.store / "pids", str(os.getpid()))
    for kind in options.fork:
        _fork(kind, options.store)
    agent = EchoAgent(options.store)
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:
            _say({"id": message["id"], **agent.answer(message["method"], message.get("params") or {})})


class EchoAgent:
    def __init__(self, store: Path) -> None:
        self.store = store
        self.said: dict[str, list[str]] = {}

    def answer(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Return the result, or the error, of a request."""
        if method == "initialize":
            can = {"loadSession": False, "sessionCapabilities": {"resume": {}}}
            info = {"name": "echo", "version": "1.0"}
            return {"result": {"protocolVersion": 1, "agentCapabilities": can, "agentInfo": info}}
        if method == "session/new":
            session = uuid.uuid4().hex
            self.said[session] = []
            self._file(session).touch()
            return {"result": {"sessionId": session}}
        if method == "session/resume":
            session = params["sessionId"]
            if not self._file(session).exists():
                return {"error": {"code": -32002, "message": "no such session"}}
            self.said[session] = self._file(session).read_text(encoding="utf-8").splitlines()
            return {"result": {}}
        if method == "session/prompt":
            return self._prompt(params["sessionId"], params["prompt"][0]["text"])
        return {"error": {"code": -32601, "message": f"no {method}"}}

    def _prompt(self, session: str, text: str) -> dict[str, Any]:
        _note(self.store / "ledger", f"begin {os.getpid()} {text}")
        earlier = self.said[session]
        _note(self._file(session), text)
        if text.startswith("/hang"):
            time.sleep(1e6)
        if text.startswith("/slow "):
            time.sleep(float(text.split()[1]))
        content = {"type": "text", "text": f"turn {len(earlier) + 1}: {text}; before: {earlier[-1] if earlier else ''}"}
        update = {"sessionUpdate": "agent_message_chunk", "content": content}
        earlier.append(text)
        _say({"method": "session/update", "params": {"sessionId": session, "update": update}})
        _note(self.store / "ledger", f"end {os.getpid()} {text}")
        return {"result": {"stopReason": "end_turn"}}

    def _file(self, session: str) -> Path:
        return self.store / f"{session}.session"


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def _note(path: Path, line: str) -> None:
    """Add a line in one piece, whoever else writes."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def _fork(kind: str, store: Path) -> None:
    """Start a process that would like to outlive us: only its environment tells that it is ours."""
    script = f"trap '' TERM HUP INT; echo $$ >> {shlex.quote(str(store / 'pids'))}; while :; do sleep 1; done"
    command = ["sh", "-c", script]
    if kind == "daemon":  # nobody's child, in a session of its own
        subprocess.run(["sh", "-c", 'setsid "$@" &', "daemon", *command], stdin=subprocess.DEVNULL, check=True)
    else:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=kind == "setsid")


if __name__ == "__main__":
    main()
