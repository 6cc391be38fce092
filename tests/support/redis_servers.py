"""Servers that tests may stop and start: the embedded Valkey, and this machine's Redis."""

import shutil
import socket
import subprocess
from pathlib import Path

import redis

from pool import embedded
from tests.support.waiting import wait_until


class EmbeddedServer:
    """The embedded Valkey; its URL survives a restart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "valkey"
        self.start()

    def start(self) -> None:
        self.url = embedded.embedded_url(self.folder)

    def stop(self) -> None:
        embedded.stop(self.folder)


class DebianRedis:
    """``/usr/bin/redis-server``, which writes down everything at once."""

    binary = shutil.which("redis-server", path="/usr/bin")

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "redis"
        self.folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --dir {self.folder} --appendonly yes --appendfsync always"
        self.process = subprocess.Popen([str(self.binary), *options.split()], stdout=subprocess.DEVNULL)

        def answers() -> bool:
            with redis.Redis.from_url(self.url) as client:
                try:
                    return bool(client.ping())
                except redis.ConnectionError:
                    return False

        wait_until(answers, "redis-server answers")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
