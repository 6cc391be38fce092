"""Metrics over HTTP, and traces of a real worker."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from prometheus_client.parser import text_string_to_metric_families

from pool.errors import ConfigError
from pool.metrics import MetricsServer, NodeMetrics, PoolMetrics, merge
from tests.support.redis_servers import EmbeddedServer
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


def get(port: int, path: str = "/metrics", host: str = "127.0.0.1") -> tuple[int, str, str]:
    """Status, content type and body."""
    with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=20) as answer:
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    """Serves both registries of a node, as a worker does."""
    pool, node = PoolMetrics(lambda: {"waiting": 3}), NodeMetrics(lambda: {"shards": 5, "shards_total": 64})
    pool.acquired("canary-key", "default", 0.2, warm=False)
    server = MetricsServer("127.0.0.1", 0, lambda: merge(pool.render(), node.render()))
    yield server
    server.close()


def test_prometheus_can_read_what_is_served(server: MetricsServer) -> None:
    """Content type, both registries, no name twice."""
    status, kind, body = get(server.port)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    names = [family.name for family in text_string_to_metric_families(body)]
    assert {"backend_pool_waiters", "backend_pool_shards_owned", "backend_pool_acquire_seconds"} <= set(names)
    assert len(set(names)) == len(names)
    assert "canary-key" not in body


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metricsx", "/favicon.ico", "/../metrics"])
def test_nothing_else_is_served(server: MetricsServer, path: str) -> None:
    """Any other path is 404."""
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        get(server.port, path)
    caught.value.close()


def test_the_answer_names_no_versions(server: MetricsServer) -> None:
    """Whoever can reach the port learns nothing about Python."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/metrics")
    assert connection.getresponse().headers["Server"].strip() == "backend-pool"
    connection.close()


def test_a_port_in_use_is_a_config_error_that_names_it(server: MetricsServer) -> None:
    """With the setting, the address and the reason."""
    with pytest.raises(ConfigError) as caught:
        MetricsServer("127.0.0.1", server.port, bytes)
    for part in (f"POOL_METRICS_PORT={server.port}", "POOL_METRICS_HOST=127.0.0.1", "Address already in use"):
        assert part in str(caught.value)


def test_an_address_that_is_not_ours_is_a_config_error() -> None:
    """TEST-NET-1 is on no machine."""
    with pytest.raises(ConfigError, match=r"POOL_METRICS_HOST=192\.0\.2\.1"):
        MetricsServer("192.0.2.1", 0, bytes)


def test_close_gives_the_port_back(server: MetricsServer) -> None:
    """Another one can have it at once."""
    first = MetricsServer("127.0.0.1", 0, bytes)
    first.close()
    MetricsServer("127.0.0.1", first.port, bytes).close()


def test_a_client_that_says_nothing_holds_up_neither_others_nor_the_end() -> None:
    """Each has a thread of its own, and none is waited for."""
    server = MetricsServer("127.0.0.1", 0, lambda: b"backend_pool_x 1\n")
    with socket.create_connection(("127.0.0.1", server.port), 20):
        assert get(server.port)[2] == "backend_pool_x 1\n"
        server.close()


def test_a_scrape_that_fails_is_an_error_and_the_next_one_works() -> None:
    """Prometheus sees it (``up`` is 0), and what went wrong is not told to the client."""
    answers = [RuntimeError("canary-secret"), None]

    def render() -> bytes:
        if (error := answers.pop(0)) is not None:
            raise error
        return b"backend_pool_x 1\n"

    server = MetricsServer("127.0.0.1", 0, render)
    with pytest.raises(urllib.error.HTTPError, match="500") as caught:
        get(server.port)
    assert b"canary-secret" not in caught.value.read()
    caught.value.close()
    assert get(server.port)[0] == 200
    server.close()


def test_many_scrapes_at_once_while_the_pool_works() -> None:
    """None fails, and counters never go backwards."""
    pool = PoolMetrics(dict)
    server = MetricsServer("127.0.0.1", 0, pool.render)
    stop, failures = threading.Event(), []

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            pool.executed(f"kind-{number % 20}", 0.1, "ok")
            pool.acquired("k", "a", 0.0, warm=True)

    def scrape() -> None:
        last = 0.0
        for _ in range(5):
            body = get(server.port)[2]
            hits = float(
                next(line for line in body.splitlines() if line.startswith("backend_pool_warm_hits_total")).split()[1]
            )
            if hits < last:
                failures.append((last, hits))
            last = hits

    worker = threading.Thread(target=work)
    scrapers = [threading.Thread(target=scrape) for _ in range(4)]
    for thread in [worker, *scrapers]:
        thread.start()
    for thread in scrapers:
        thread.join()
    stop.set()
    worker.join()
    server.close()
    assert not failures


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    """The URL of a Valkey of the test's own."""
    server = EmbeddedServer(tmp_path)
    yield server.url
    server.stop()


@pytest.fixture
def spans_file(tmp_path: Path, broker: str) -> Iterator[Path]:
    """Where a worker with opentelemetry-instrumentation-celery writes its spans."""
    file = tmp_path / "spans"
    file.touch()
    command = [sys.executable, "-m", "celery", "-A", "tests.integration.traced_app"]
    command += ["worker", "-P", "threads", "-c", "1", "-l", "INFO"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "BROKER_URL": broker, "SPANS_FILE": str(file)}
    log = tmp_path / "worker.log"
    with log.open("wb") as out:
        worker = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
    try:
        wait_until(lambda: " ready." in log.read_text() or worker.poll() is not None, "the worker is ready", 60)
        assert worker.poll() is None, log.read_text()
        yield file
    finally:
        worker.terminate()
        try:
            worker.wait(30)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def test_spans_of_the_pool_are_in_the_trace_of_the_task(spans_file: Path, broker: str) -> None:
    """From the producer's traceparent over the worker's span of the task to those of its backend."""
    trace_id, parent = f"{time.time_ns():032x}", f"{1:016x}"

    def spans() -> dict[str, dict[str, Any]]:
        lines = spans_file.read_text().splitlines()
        return {span["name"]: span for span in map(json.loads, lines)}

    with Celery("producer", broker=broker, set_as_current=False) as producer:
        producer.send_task("traced.build", ["user-1"], headers={"traceparent": f"00-{trace_id}-{parent}-01"})
        wait_until(lambda: "run/traced.build" in spans(), "the task's span has ended", 60)
    found = spans()
    task = found.pop("run/traced.build")
    assert task["parent_id"] == f"0x{parent}"
    assert set(found) == {"backend_pool.acquire", "backend_pool.exec"}
    for span in found.values():
        assert span["context"]["trace_id"] == task["context"]["trace_id"] == f"0x{trace_id}"
        assert span["parent_id"] == task["context"]["span_id"]
    assert found["backend_pool.acquire"]["attributes"]["backend_pool.key"] == "user-1"
