"""pytest-celery's clusters over local processes; one site (data folder and Valkey) and its nodes for each module.

A module says what runs in it by overriding `hosts` and `start_nodes`. Those who start nodes of their own for each test
override nothing and ask for `start`.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryWorkerCluster,
)

from pool.loopback_sshd import LoopbackSshd
from tests.support.celery_nodes import WorkerNode, live
from tests.support.cluster import Cluster
from tests.support.ledger import Ledger
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.services import require_service
from tests.support.site import Gate, Producer, Site


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show the logs of every live node beside a failure."""
    report = yield
    if report.failed:
        for container in list(live.values()):
            report.sections.append((f"log of {container.name} ({container.status})", container.logs()[-8000:]))
    return report


@pytest.fixture(scope="module")
def broker() -> str:
    """``redis`` or ``rabbitmq``. A module that runs on both overrides this with ``params=BROKERS``."""
    return "redis"


@pytest.fixture(scope="module")
def site(broker: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A data folder with its embedded Valkey."""
    rabbit = request.getfixturevalue("rabbit") if broker == "rabbitmq" else None
    site = Site(tmp_path_factory.mktemp("site"), rabbit)
    yield site
    site.teardown()


@pytest.fixture(scope="module")
def sshd(site: Site) -> Iterator[LoopbackSshd]:
    """A build host."""
    with LoopbackSshd(site.folder / "sshd", home=site.folder / "home", max_sessions=64) as server:
        yield server


@pytest.fixture(scope="module")
def openssh(site: Site) -> Iterator[OpenSshd]:
    """A build host with a process for each connection."""
    require_service("sshd", sshd_binary())
    with OpenSshd(site.folder / "openssh", max_sessions=64, max_startups="1000:1:1000") as server:
        yield server


@pytest.fixture(scope="module")
def host_folder(openssh: OpenSshd) -> Iterator[Path]:
    """A folder at the build host that its account may write to."""
    folder = Path(tempfile.mkdtemp(prefix="ledger-", dir=openssh.info.home))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def ledger(host_folder: Path) -> Ledger:
    """Where builds are written down."""
    return Ledger(host_folder / f"ledger{len(list(host_folder.iterdir()))}")


@pytest.fixture
def cluster(site: Site, start: Callable[..., WorkerNode], ledger: Ledger) -> Cluster:
    """Nodes that share the shards out."""
    return Cluster(site, start, ledger)


@pytest.fixture(scope="module")
def hosts(site: Site) -> str | None:
    """The text of the hosts file; None: there is none, so each key works in a folder of the data folder."""
    return None


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    """Start the nodes that all tests of the module share."""
    return lambda site: []


@pytest.fixture(scope="module")
def celery_broker_cluster(site: Site) -> CeleryBrokerCluster:
    """The site's Valkey or RabbitMQ."""
    return CeleryBrokerCluster(CeleryTestBroker(site.broker))


@pytest.fixture(scope="module")
def celery_backend_cluster(site: Site) -> CeleryBackendCluster:
    """The site's Valkey: it keeps the results, whatever the broker is."""
    return CeleryBackendCluster(CeleryTestBackend(site.valkey))


@pytest.fixture(scope="module")
def celery_worker_cluster(
    site: Site, hosts: str | None, start_nodes: Callable[[Site], list[WorkerNode]]
) -> Iterator[CeleryWorkerCluster | None]:
    """The module's nodes, all ready; None where each test starts its own."""
    if hosts is not None:
        site.write_hosts(hosts)
    nodes = start_nodes(site)
    try:
        for node in nodes:
            node.ready()
        yield CeleryWorkerCluster(*nodes) if nodes else None
    finally:
        for node in nodes:
            node.container.teardown()


@pytest.fixture
def celery_setup_cls() -> type[Producer]:
    """The plugin makes its app by this class."""
    return Producer


@pytest.fixture
def producer(celery_setup: Producer) -> Producer:
    """Send tasks to the nodes of the module."""
    return celery_setup


@pytest.fixture
def start(site: Site, producer: Producer) -> Iterator[Callable[..., WorkerNode]]:
    """Start nodes that end with the test, and leave nothing in the Valkey."""
    nodes: list[WorkerNode] = []

    def start(*args: Any, ready: bool = True, **kwargs: Any) -> WorkerNode:
        nodes.append(site.start(*args, **kwargs))
        if ready:
            nodes[-1].ready()
        return nodes[-1]

    yield start
    ending = [node for node in nodes if node.container.status == "running"]
    for node in ending:  # all of them at once: none needs to take what the others have
        node.kill("SIGTERM")
    for node in ending:
        with contextlib.suppress(AssertionError):
            node.wait()
    for node in nodes:
        node.container.teardown()
    site.forget_everything()


@pytest.fixture
def gate(site: Site, key: str) -> Iterator[Gate]:
    """A build of the key that ends when the test says so."""
    gate = Gate(site.work(key))
    yield gate
    gate.folder.mkdir(parents=True, exist_ok=True)
    gate.open()


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key that no other test uses."""
    return f"u{crc32(request.node.nodeid.encode())}"
