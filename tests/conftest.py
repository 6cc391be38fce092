"""What several kinds of tests share."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.rabbitmq import RabbitServer, rabbitmq_binary
from tests.support.services import require_service

ALONE = {"test_agent_killed.py", "test_doctor.py", "test_leftovers.py"}
"""Files that end, or look for, what killed workers have left anywhere on this machine; acceptance tests do, too."""


settings.register_profile("patient", deadline=None)  # how long an example takes is this machine's affair
settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what must not run beside other tests."""
    for item in items:
        if item.path.name in ALONE or "acceptance" in item.path.parts:
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A private RabbitMQ for everything in the run that wants one; each takes a virtual host of its own."""
    require_service("rabbitmq-server", rabbitmq_binary())
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server
