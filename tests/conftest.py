"""What several kinds of tests share."""

from collections.abc import Iterator

import pytest

from tests.support.rabbitmq import RabbitServer, rabbitmq_binary
from tests.support.services import require_service

MACHINE_WIDE = {
    "test_agent_killed.py",
    "test_chat_example.py",
    "test_cli.py",
    "test_doctor.py",
    "test_examples.py",
    "test_leftovers.py",
    "test_real_agents.py",
    "test_turns.py",
}
"""Files that end, or look for, what killed workers left anywhere on this machine: never two of them side by side."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes, keep the tests of a file in one of them; they share servers and nodes."""
    for item in items:
        group = "machine" if item.path.name in MACHINE_WIDE else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A private RabbitMQ for everything in the run that wants one; each takes a virtual host of its own."""
    require_service("rabbitmq-server", rabbitmq_binary())
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server
