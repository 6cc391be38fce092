"""The loopback SSH server with a password besides its key."""

from functools import partial
from pathlib import Path
from typing import Any

from pool import loopback_sshd
from pool.loopback_sshd import LoopbackSshd, Sshd


class PasswordSshd(LoopbackSshd):
    """Whoever knows *password* may log in, under any name. The server reads it from a file: no command line shows it."""

    def __init__(self, folder: Path, password: str) -> None:
        super().__init__(folder, home=folder / "home", max_sessions=64)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "password").touch(mode=0o600)
        (folder / "password").write_text(password)
        self._command[self._command.index(loopback_sshd.__name__)] = __name__


class _Connection(loopback_sshd._Connection):
    def __init__(self, server: Sshd, password: str) -> None:
        super().__init__(server)
        self._password = password

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return password == self._password


_serve = loopback_sshd.serve


async def _serve_with_password(folder: Path, **options: Any) -> Sshd:
    server = await _serve(folder, **options)
    factory = partial(_Connection, server, (folder / "password").read_text())
    server.acceptor.update(server_factory=factory, password_auth=True)
    return server


if __name__ == "__main__":
    loopback_sshd.serve = _serve_with_password
    loopback_sshd.main()
