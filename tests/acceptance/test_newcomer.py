"""What somebody sees who has only just cloned the project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pool import embedded
from tests.support.celery_nodes import WorkerContainer, WorkerNode, bare_environment

PRODUCER = """
import json
import worker_config
from tasks.builds import run_build
first = run_build.delay("user-1", "uname -a").get(timeout=60)
second = run_build.delay("user-1", "uname -a").get(timeout=60)
print(json.dumps([first, second]))
"""


@pytest.fixture
def folder(tmp_path: Path):
    """Where the newcomer's shell is; the Valkey of its ``.pool`` is gone afterwards."""
    yield tmp_path
    embedded.stop(tmp_path / ".pool" / "valkey")


def test_a_worker_without_any_setting_builds_warm_for_a_producer_in_another_process(folder: Path) -> None:
    """No variable, no broker, no file: start the worker, call ``run_build``; the second call is warm, in the same process."""
    node = WorkerNode(WorkerContainer("celery", folder), None)
    try:
        node.ready()
        done = subprocess.run(
            [sys.executable, "-c", PRODUCER],
            cwd=folder,
            env=bare_environment(),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        first, second = json.loads(done.stdout)
        uname = subprocess.run(["uname", "-a"], capture_output=True, text=True, check=True).stdout
        assert first["output"] == second["output"] == uname
        assert (first["exit_code"], first["warm"], first["key"]) == (0, False, "user-1")
        assert (second["warm"], second["pid"], second["node"]) == (True, first["pid"], node.hostname())
        assert first["pid"] == node.pid
        assert node.stop() == 0
        # The last user has gone: nothing is left running, and no folder but the hidden one was made.
        assert not embedded.EmbeddedValkey(folder / ".pool" / "valkey")._runs()
        assert sorted(path.name for path in folder.iterdir() if path.suffix != ".log") == [".pool"]
    finally:
        node.container.teardown()
