"""A backend seen from one of its folders."""

import posixpath
from collections.abc import Callable, Mapping
from typing import TypeVar

from pool.backends.base import Backend, BackendStatus, Capabilities
from pool.backends.paths import normalise
from pool.backends.shell import check_env
from pool.backends.workspace import Place, Workspace

T = TypeVar("T")


class ScopedBackend(Workspace):
    """The same connection with a folder as root and more environment; made by `Workspace.scope`.

    It lives as long as its backend, and has nothing of its own to close.
    """

    def __init__(self, parent: Workspace, path: str, env: Mapping[str, str] | None) -> None:
        self._driver = parent._driver
        # Relative to the driver's root, which may be known only after the first connect.
        root = Place(self._driver.root, parent._base).full
        self._base = posixpath.normpath(posixpath.join(parent._base, normalise(path, root)))
        self._outer = (*parent._outer, parent._base)
        self._env = {**parent._env, **check_env(env)}

    @property
    def backend(self) -> Backend:
        """The backend under all scopes."""
        assert isinstance(self._driver, Backend)
        return self._driver

    @property
    def status(self) -> BackendStatus:
        """The status of the backend."""
        return self.backend.status

    @property
    def capabilities(self) -> Capabilities:
        """What the backend can do."""
        return self.backend.capabilities

    def on_status_change(self, listener: Callable[[BackendStatus], object]) -> Callable[[], None]:
        """See `Backend.on_status_change`."""
        return self.backend.on_status_change(listener)

    def track_closeable(self, resource: T) -> T:
        """Close *resource* with the backend; see `Backend.track_closeable`."""
        return self.backend.track_closeable(resource)

    def destroy(self) -> None:
        """Do nothing: the connection belongs to the backend, which others use too."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._base!r} of {self._driver!r}>"
