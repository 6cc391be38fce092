"""An app that had a life before the pool keeps it."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from pool.sharding.hashing import queue_name, shard_of
from tests.support.celery_nodes import WorkerNode, bare_environment
from tests.support.site import RESULT_TIMEOUT, Producer, Site

EXISTING = "tests.acceptance.apps.existing"

# As the app's own web process would do it.
WEB = """
import json
from tests.acceptance.apps.existing import add, build, send_mail
results = [add.delay(1, 2), send_mail.delay("bob"), build.delay("acme", "echo hi"), build.s("acme", "pwd").apply_async()]
print(json.dumps([result.get(timeout=60) for result in results]))
"""


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    return lambda site: [site.start(app=EXISTING)]


def test_its_own_routes_and_plain_tasks_run_beside_keyed_ones(producer: Producer, site: Site) -> None:
    """One worker: the default queue, the queue of a route of its own, the shard queue of a key."""
    done = subprocess.run(
        [sys.executable, "-c", WEB],
        cwd=site.folder,
        env={**bare_environment(), **site.env},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    added, mailed, built, where = json.loads(done.stdout)
    node = producer.worker.hostname()
    shard = queue_name(shard_of("acme", 64))
    assert added == {"sum": 3, "queue": "main", "node": node}
    assert mailed == {"to": "bob", "queue": "mail", "node": node}
    assert built == {"output": "hi\n", "queue": shard, "node": node}
    assert where["output"].strip() == str(site.work("acme"))


def test_its_queues_are_consumed_beside_the_shards(producer: Producer) -> None:
    """``task_queues`` of its own stays; every shard queue comes on top."""
    (queues,) = producer.app.control.inspect(timeout=10.0, limit=1).active_queues().values()
    expected = {"main", "mail", *(queue_name(shard) for shard in range(64))}
    assert {queue["name"] for queue in queues} == expected


def test_its_beat_entry_fires_beside_the_pool_s(producer: Producer, site: Site) -> None:
    """``beat_schedule`` of its own stays."""
    beat = site.beat(app=EXISTING)
    try:
        beat.ready()
        producer.worker.wait_for("'to': 'all'", RESULT_TIMEOUT)
    finally:
        beat.teardown()
