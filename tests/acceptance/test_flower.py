"""Flower, as whoever operates the nodes has it: in a browser, with a password, two nodes that share the shards out."""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.browser import Browser, chromium_binaries
from tests.support.celery_nodes import CHECKOUT, WorkerNode
from tests.support.flower import Flower
from tests.support.services import require_service
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

USERS = [f"user-{number}" for number in range(1, 9)]
SECRET = "canary-8d1f"
SHARDS = {f"pool.shard.{shard:03d}" for shard in range(64)}

PAGE_TIMEOUT = 30.0
"""Seconds until a page shows what is so: Flower asks the nodes anew behind each look at a page."""


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    return lambda site: [site.start("north"), site.start("south")]


@pytest.fixture(scope="module")
def nodes(celery_worker_cluster: Any) -> list[WorkerNode]:
    """Both nodes."""
    return list(celery_worker_cluster)


@pytest.fixture(scope="module")
def flower(site: Site, nodes: list[WorkerNode]) -> Iterator[Flower]:
    """A Flower that knows both nodes."""
    flower = Flower(site)
    try:
        flower.ready()
        flower.wait_for(*nodes)
        yield flower
    finally:
        flower.teardown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A window that nobody has logged in with."""
    require_service("chromium with chromedriver", chromium_binaries())
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def window(browser: Browser, flower: Flower) -> Browser:
    """The window, logged in."""
    browser.log_in(flower.user, flower.password)
    return browser


@pytest.fixture
def built(producer: Producer, flower: Flower, site: Site) -> Iterator[dict[str, list[str]]]:
    """Builds of some users, which Flower has heard of: task ids by the state that they are in."""
    gate = Gate(site.work(USERS[0]))
    write_scripts(
        site, {"build.sh": gate.command, "test.sh": "echo tested", "lint.sh": "echo 'line 7: too long' >&2; exit 2"}
    )
    (gate.folder / "go").unlink(missing_ok=True)
    runs = gate.runs
    running = producer.build(USERS[0], "sh build.sh")
    try:
        gate.wait_started(runs + 1)
        good = [producer.build(user, "sh test.sh", env={"TOKEN": SECRET}) for user in USERS[1:]]
        bad = producer.build(USERS[1], "sh lint.sh")
        for result in good:
            result.get(timeout=RESULT_TIMEOUT)
        assert bad.get(timeout=RESULT_TIMEOUT, propagate=False).args[0].startswith("exit code 2")
        ids = {"STARTED": [running.id], "SUCCESS": [each.id for each in good], "FAILURE": [bad.id]}
        for state, tasks in ids.items():
            flower.wait_state(state, *tasks)
        yield ids
    finally:
        gate.open()
    running.get(timeout=RESULT_TIMEOUT)


def write_scripts(site: Site, scripts: dict[str, str]) -> None:
    """Put these files where each user's commands start."""
    for user in USERS:
        site.work(user).mkdir(parents=True, exist_ok=True)
        for name, text in scripts.items():
            (site.work(user) / name).write_text(text)


def picture(window: Browser, name: str) -> None:
    """Renew a picture of the documentation, where that is wanted."""
    if os.environ.get("POOL_SCREENSHOTS") == "1":
        window.picture(CHECKOUT / "docs" / "img" / name)


def open_tab(window: Browser, flower: Flower, node: WorkerNode, tab: str) -> list[list[str]]:
    """Open a node's page, and return the rows of one of its tabs."""
    window.open(f"{flower.url}/worker/{node.hostname()}")
    window.click(f"#worker-tab-{tab}")
    return wait_until(lambda: window.rows(f"#tab-{tab}.show.active"), f"tab {tab} has rows", PAGE_TIMEOUT)


def test_nothing_is_shown_without_the_password(browser: Browser, flower: Flower) -> None:
    """401 in the browser, and for whoever has a wrong one; the password is on no command line."""
    browser.open(f"{flower.url}/static/css/flower.css")  # it asks for nothing
    assert {browser.status(path) for path in ("/", "/workers", "/tasks", "/broker", "/api/workers")} == {401}
    assert flower.get("/workers", password="wrong").status_code == 401
    assert flower.password not in " ".join(flower.command)


def test_tasks_show_their_keys_and_states(window: Browser, flower: Flower, built: dict[str, list[str]]) -> None:
    """The list of tasks: each build with the user it is for, its state, and no secret; a failed one's page tells why."""
    window.open(f"{flower.url}/tasks")
    count = sum(map(len, built.values()))
    rows = wait_until(
        lambda: len(found := window.rows("#tasks-table")) >= count and found, "all builds are listed", PAGE_TIMEOUT
    )
    builds = [row for row in rows if row[0] == "tasks.builds.run_build"]
    states = {(re.match(r"\('([^']*)'", row[1])[1], row[3]) for row in builds}
    assert states >= {(USERS[0], "STARTED"), (USERS[1], "FAILURE"), *((user, "SUCCESS") for user in USERS[1:])}
    assert {row[2] for row in builds} == {"{}", "{'env': {'TOKEN': '***'}}"}
    window.click(".dataTables_scrollHead th[data-column=state]")  # the failed ones first
    wait_until(lambda: [row[3:4] for row in window.rows("#tasks-table")][:1] == [["FAILURE"]], "sorted", PAGE_TIMEOUT)
    picture(window, "flower-tasks.png")
    window.open(f"{flower.url}/task/{built['FAILURE'][0]}")
    assert "line 7: too long" in window.text("#task-page")


def test_both_nodes_are_online(window: Browser, flower: Flower, nodes: list[WorkerNode], built: Any) -> None:
    """The first page names both nodes, and says that they are online."""
    window.open(flower.url)
    names = {node.hostname() for node in nodes}

    def online() -> set[str]:  # a long name is shown in two lines
        return {"".join(row[0].split()) for row in window.rows("#workers-table") if row[1:2] == ["Online"]}

    wait_until(lambda: online() == names, lambda: f"both online: {window.rows('#workers-table')}", PAGE_TIMEOUT)
    wait_until(lambda: window.text("#workers-active") == "1", "the running build is counted", PAGE_TIMEOUT)
    picture(window, "flower-workers.png")


def test_the_other_tab_shows_the_backend_pool(
    window: Browser, flower: Flower, nodes: list[WorkerNode], producer: Producer
) -> None:
    """A flat summary, true in its numbers: this node's backends and how many shards are its own."""
    node = nodes[0]
    for user in USERS:
        producer.built(user)
    owned = {user for user in USERS if producer.where(user)["node"] == node.hostname()}

    def summary() -> dict[str, Any]:
        shown = dict(open_tab(window, flower, node, "other"))["backend_pool"]
        assert not re.search(r"[\[(<]|\{.*\{", shown), f"flat and readable: {shown}"
        return {name: value.strip() for name, value in re.findall(r"'(\w+)': ([^,}]+)", shown)}

    def true() -> bool:
        found = summary()
        return (found["total"], found["busy"], found["idle"]) == (f"{len(owned)}", "0", f"{len(owned)}")

    wait_until(true, lambda: f"{len(owned)} idle backends in {summary()}", PAGE_TIMEOUT, every=0.2)
    assert summary()["shards"] == "32"
    picture(window, "flower-pool.png")


def test_each_shard_has_its_queue_at_one_node(window: Browser, flower: Flower, nodes: list[WorkerNode]) -> None:
    """The Queues tabs of the two nodes: no shard is in both, and together they are all."""

    def queues(node: WorkerNode) -> set[str]:
        return {row[0] for row in open_tab(window, flower, node, "queues") if row[0].startswith("pool.shard.")}

    def shared_out() -> bool:
        north, south = map(queues, nodes)
        return not north & south and north | south == SHARDS

    wait_until(shared_out, lambda: f"{[sorted(queues(node)) for node in nodes]}", PAGE_TIMEOUT, every=0.2)
    assert {len(queues(node)) for node in nodes} == {32}


def test_the_broker_page_lists_the_shard_queues(
    window: Browser, flower: Flower, producer: Producer, site: Site, nodes: list[WorkerNode]
) -> None:
    """Every shard's queue with the number of its messages."""
    window.open(f"{flower.url}/broker")
    rows = wait_until(lambda: window.rows("#queue-table"), "queues are listed", PAGE_TIMEOUT)
    assert {row[0] for row in rows} == SHARDS | {"celery"}
    assert {row[1] for row in rows} == {"0"}
