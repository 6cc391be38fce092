"""agent-backend, twice: its Python client, which can only talk to a daemon of its own, and its TypeScript client.

`AgentBackendPython` logs in to ``agent-backend daemon`` (npm), whose SSH server lives in node: another server than the
other peers have. `AgentBackendNode` is told to use plain SSH, and so meets the same OpenSSH as the others.
"""

import asyncio
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY
from benchmarks.peers.base import Missing, Peer
from benchmarks.peers.on_asyncssh import MAX_CHANNELS
from pool.runtime import loop_thread

PACKAGES = "POOL_PEERS_DIR"
"""Environment variable: the folder whose ``node_modules`` has agent-backend; default ``.pool/peers`` (make peers)."""
_READY_TIMEOUT = 20.0  # seconds for the daemon to listen
_ANSWER_TIMEOUT = 60.0  # seconds for node to answer: with more commands than its 50 channels it may never do


def node_package() -> Path:
    """The folder of agent-backend from npm. Raises `Missing`."""
    folder = Path(os.environ.get(PACKAGES) or REPOSITORY / ".pool" / "peers") / "node_modules" / "agent-backend"
    if shutil.which("node") is None:
        raise Missing("needs node, which is not installed")
    if not folder.is_dir():
        raise Missing("agent-backend (npm) is not installed: make peers")
    return folder


class AgentBackendPython(Peer):
    name = "agent-backend, Python"

    def connect(self) -> None:
        try:
            from agent_backend import RemoteFilesystemBackend, RemoteFilesystemBackendConfig
        except ImportError:
            raise Missing("not installed") from None
        self._daemon = _Daemon(self.target.path, self.target.username)
        config = RemoteFilesystemBackendConfig(
            root_dir=str(self.target.path),
            host="127.0.0.1",
            port=self.target.way(self._daemon.port),
            auth_token=self._daemon.token,
            prevent_dangerous=False,
        )
        self.backend = RemoteFilesystemBackend(config)
        loop_thread().run(self.backend.connect())

    def run(self, command: str) -> int:
        loop_thread().run(self.backend.exec(command))  # it raises for any exit code but 0
        return 0

    def many(self, command: str, count: int) -> int:
        return loop_thread().run(self._many(command, count))

    async def _many(self, command: str, count: int) -> int:
        """All at once: it has no limit, and its daemon none either."""
        results = await asyncio.gather(*(self.backend.exec(command) for _ in range(count)), return_exceptions=True)
        return sum(isinstance(result, BaseException) for result in results)

    def read(self, path: str) -> bytes:
        from agent_backend import ReadOptions

        content: bytes = loop_thread().run(self.backend.read(self._inside(path), ReadOptions(encoding="buffer")))
        return content

    def write(self, path: str, data: bytes) -> None:
        loop_thread().run(self.backend.write(self._inside(path), data))

    def _inside(self, path: str) -> str:
        return path.removeprefix(f"{self.target.folder}/")

    def close(self) -> None:
        if "backend" in vars(self):
            loop_thread().run(self.backend.destroy())
        if "_daemon" in vars(self):
            self._daemon.stop()


class AgentBackendNode(Peer):
    """Its commands pass a pipe to node and back, which is not counted: node looks at its own clock."""

    name = "agent-backend, TypeScript"

    def connect(self) -> None:
        package, target = node_package(), self.target
        config = {
            "transport": "ssh",
            "host": "127.0.0.1",
            "port": target.port,
            "sshPort": target.port,
            "rootDir": str(target.path),
            "keyFile": str(target.client_key),
            "sshAuth": {"type": "key", "credentials": {"username": target.username}},
        }
        script = Path(__file__).with_name("agent_backend.mjs")
        command = ["node", str(script), str(package / "dist" / "index.js"), json.dumps(config)]
        self._file = Path(tempfile.mkdtemp(prefix="pool-node-")) / "file"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.ask("connect")

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Have node do something. Raises `RuntimeError` with what it failed with; killed if it says nothing."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self.process.stdin.flush()
        watch = threading.Timer(_ANSWER_TIMEOUT, self.process.kill)
        watch.start()
        try:
            while line := self.process.stdout.readline():
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    if "error" in answer:
                        raise RuntimeError(answer["error"])
                    return answer
        finally:
            watch.cancel()
        if self.process.wait() == -signal.SIGKILL:
            raise RuntimeError(f"no answer within {_ANSWER_TIMEOUT:g} s")
        self._log.seek(0)
        raise RuntimeError(f"node ended: {self._log.read()[-500:].decode(errors='replace')}")

    def run(self, command: str) -> int:
        self.ask("run", command=command)
        return 0

    def read(self, path: str) -> bytes:
        self.ask("read", path=self._inside(path), local=str(self._file))
        return self._file.read_bytes()

    def write(self, path: str, data: bytes) -> None:
        self._file.write_bytes(data)
        self.ask("write", path=self._inside(path), local=str(self._file))

    def many(self, command: str, count: int) -> int:
        """Told all at once, its queue of operations hung in more than one run."""
        return int(self.ask("many", command=command, count=count, limit=MAX_CHANNELS)["failed"])

    def time_run(self, command: str) -> float:
        return float(self.ask("run", command=command)["ms"])

    def time_read(self, path: str) -> float:
        return float(self.ask("read", path=self._inside(path), local=str(self._file))["ms"])

    def time_write(self, path: str, data: bytes) -> float:
        self._file.write_bytes(data)
        return float(self.ask("write", path=self._inside(path), local=str(self._file))["ms"])

    def _inside(self, path: str) -> str:
        return path.removeprefix(f"{self.target.folder}/")

    def close(self) -> None:
        if "process" not in vars(self):
            return
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._log.close()
        shutil.rmtree(self._file.parent, ignore_errors=True)
        del self.process


class _Daemon:
    """``agent-backend daemon`` for one folder, under the account that owns it; it listens when it is made."""

    def __init__(self, root: Path, username: str) -> None:
        package = node_package()
        self.token = secrets.token_hex(16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        command = ["node", str(package / "bin" / "agent-backend.js"), "daemon", "--rootDir", str(root)]
        command += ["--port", str(self.port), "--isolation", "none", "--auth-token", self.token]
        account = pwd.getpwnam(username)
        env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": account.pw_dir}
        who: dict[str, Any] = {}
        if os.geteuid() == 0:
            who = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, **who
        )
        self._await()

    def _await(self) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self._log.seek(0)
                    text = self._log.read()[-300:].decode(errors="replace")
                    self.stop()
                    raise RuntimeError(f"its daemon did not start: {text}") from None
                time.sleep(0.01)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
