"""An SSH server of either kind: the loopback one, and OpenSSH where it is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pool.loopback_sshd import LoopbackSshd
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.services import require_service

OPENSSH = pytest.param("openssh", marks=pytest.mark.openssh)
KINDS = ["loopback", OPENSSH]


@contextmanager
def serving(kind: str, folder: Path, **options: Any) -> Iterator[LoopbackSshd | OpenSshd]:
    """Run a server of the *kind*, or of a kind of backend that begins with it."""
    if kind.startswith("openssh"):
        require_service("sshd", sshd_binary())
        with OpenSshd(folder / "sshd", **options) as server:
            yield server
    else:
        with LoopbackSshd(folder / "sshd", home=folder / "home", **options) as server:
            yield server
