"""One of each kind of backend, each with a root folder of its own, under one interface."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pool.backends.local import LocalFilesystemBackend
from pool.backends.memory import MemoryBackend
from pool.backends.ssh import RemoteFilesystemBackend
from pool.backends.workspace import WorkspaceBackend
from pool.loopback_sshd import SshdInfo


def shell_handler(command: str, env: Mapping[str, str]) -> tuple[int, bytes, bytes]:
    """Let a memory backend run commands by a real shell (but not in its folders, which no shell can see)."""
    done = subprocess.run(["/bin/sh", "-c", command], env=dict(env), capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr


def login(info: SshdInfo) -> dict[str, Any]:
    """Return the config that logs in to the test server."""
    return {
        "host": "127.0.0.1",
        "port": info.port,
        "username": info.username,
        "client_keys": str(info.client_key),
        "known_hosts": str(info.known_hosts),
    }


def ssh_backend(info: SshdInfo, **config: Any) -> RemoteFilesystemBackend:
    """Return a backend that logs in to the test server."""
    return RemoteFilesystemBackend(**{**login(info), **config})


class Rig:
    """Makes backends of one kind over one fresh folder, and destroys them at the end.

    ``root`` is the backends' root, ``outside`` a folder beside it which they must not reach; it holds ``secret``.
    For the memory kind both are names only. Over SSH, commands and files go by the helper, or, for a kind that ends with
    "-channel", over channels of their own.
    """

    def __init__(self, kind: str, tmp_path: Path, info: SshdInfo | None = None) -> None:
        self.kind = kind
        self.info = info
        self._backends: list[WorkspaceBackend] = []
        self.base = tmp_path / "rig" if info is None else info.home / f"rig-{uuid.uuid4().hex}"
        self.root = self.base / "root"
        self.outside = self.base / "outside"

    def __enter__(self) -> Self:
        if self.kind != "memory":
            for folder in (self.base, self.root, self.outside):
                folder.mkdir(mode=0o755)
            (self.outside / "secret").write_text("secret")
            if self.info is not None:  # sshd may log in as somebody else than us
                owner = self.info.home.stat()
                for path in (self.base, self.root, self.outside, self.outside / "secret"):
                    os.chown(path, owner.st_uid, owner.st_gid)
        return self

    def __exit__(self, *_: object) -> None:
        for backend in self._backends:
            backend.destroy()
        shutil.rmtree(self.base, ignore_errors=True)

    def backend(self, **config: Any) -> Any:
        """Return a new backend over the root; it connects on first use."""
        config = {"root_dir": str(self.root), **config}
        if self.info is not None:
            backend: WorkspaceBackend = ssh_backend(self.info, **{"exec_mode": self.exec_mode, **config})
        elif self.kind == "local":
            backend = LocalFilesystemBackend(**config)
        else:
            backend = MemoryBackend(**{"handler": shell_handler, **config})
        self._backends.append(backend)
        return backend

    @property
    def exec_mode(self) -> str:
        """How commands and files travel over SSH."""
        return "channel" if self.kind.endswith("-channel") else "helper"

    def logins(self) -> int:
        """How often anybody has logged in to the server; 0 for kinds without one."""
        return self.info.count_logins() if self.info is not None else 0
