"""What several kinds of tests share."""

from collections.abc import Iterator

import pytest

from tests.support.rabbitmq import RabbitServer, rabbitmq_binary
from tests.support.services import require_service


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A private RabbitMQ for everything in the run that wants one; each takes a virtual host of its own."""
    require_service("rabbitmq-server", rabbitmq_binary())
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server
