"""A healthy SSH server for the tests of a module that leave it so."""

import pytest

from tests.support.leaks import no_leaks
from tests.support.rigs import Rig
from tests.support.ssh_servers import KINDS, serving


@pytest.fixture(scope="module", params=KINDS)
def server(request, tmp_path_factory):
    with serving(request.param, tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.fixture
def rig(server, tmp_path):
    """Makes backends of that server."""
    with no_leaks(), Rig("ssh", tmp_path, server.info) as rig:
        yield rig
