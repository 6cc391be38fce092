"""``docs/operations.md`` says what nodes answer, and the recipes in ``deploy/`` what they need."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from celery import Celery

import pool
from pool import Settings, install
from pool.observer import Step, StepName
from pool.sharding.coordinator import ShardStep
from pool.snapshot import BackendInfo
from pool.worker.explain import explain
from pool.worker.report import row, stats_of
from tests.support.services import require_service

ROOT = Path(pool.__file__).parents[1]
TEXT = (ROOT / "docs" / "operations.md").read_text()
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("data")
    made = install(Celery("told", broker="memory://"), Settings(node_shards=(0,), data_dir=folder))
    yield made
    made.close(0.0)


def section(begin: str, end: str) -> str:
    return TEXT[TEXT.index(begin) : TEXT.index(end)]


def first_column(table: str) -> set[str]:
    """The names in code type in the first cell of each row."""
    return {name for line in table.splitlines() if line.startswith("| `") for name in named(line.split("|")[1])}


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_every_field_of_pool_stats_is_told_of(extension: Any) -> None:
    """And no other."""
    assert first_column(section("**`pool_stats`**", "**`pool_backends")) == set(stats_of(extension))


def test_every_field_of_pool_explain_is_told_of(extension: Any) -> None:
    """And no other."""
    assert first_column(section("**`pool_explain KEY`**", "## Tell")) == set(explain(extension, "user-1"))


def test_every_field_of_a_backend_is_told_of() -> None:
    """In the list below `pool_backends`."""
    told = named(section("A backend has", "**`pool_explain"))
    fields = dict.fromkeys(get_type_hints(BackendInfo), 0)
    assert set(row(BackendInfo(**{**fields, "key": "user-1"}), 64)) <= told


def test_every_event_is_told_of() -> None:
    """As the pool and the coordinator name their steps."""
    steps = {*get_args(StepName), *get_args(get_type_hints(ShardStep)["what"])}
    table = section("## Events", "## Log")
    assert first_column(table) == {f"backend-pool-{step}" for step in steps}
    for step in Step, ShardStep:
        assert {name for name in step._fields if name != "what"} <= named(table)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_understands_the_units(unit: Path, tmp_path: Path) -> None:
    """No complaint, once the program and the user of this machine stand in for those of yours."""
    command = shutil.which("systemd-analyze")
    require_service("systemd-analyze", command)
    here = {"/srv/pool/.venv/bin/celery": sys.executable, "User=pool\n": "", "/etc/pool/pool.env": "/dev/null"}
    text = unit.read_text()
    for theirs, ours in here.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    made = tmp_path / unit.name.replace("@", "@a")
    made.write_text(text)
    done = subprocess.run(
        [str(command), "verify", "--man=no", str(made)], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if unit.name.split("@")[0] in line]
    assert (done.returncode, complaints) == (0, [])


def test_systemd_gives_a_node_the_time_that_it_needs() -> None:
    """To hand its shards over; and the signal is not for the builds."""
    unit = (ROOT / "deploy" / "systemd" / "pool-node@.service").read_text().splitlines()
    values = dict(line.split("=", 1) for line in unit if "=" in line and not line.startswith("#"))
    assert int(values["TimeoutStopSec"]) >= Settings().handoff_timeout + 30
    assert values["KillMode"] == "mixed"


def test_kubernetes_gives_a_node_the_time_that_it_needs() -> None:
    """And there is one beat, and never a second one."""
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "pool.yaml").read_text()))
    found = {(each["kind"], each["metadata"]["name"]): each["spec"] for each in documents}
    nodes = found["StatefulSet", "pool-node"]["template"]["spec"]
    (container,) = nodes["containers"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert nodes["terminationGracePeriodSeconds"] >= float(env["POOL_HANDOFF_TIMEOUT"]) + 30
    assert "livenessProbe" not in container
    beat = found["Deployment", "pool-beat"]
    assert (beat["replicas"], beat["strategy"]["type"]) == (1, "Recreate")
    assert found["PodDisruptionBudget", "pool-node"]["selector"] == found["StatefulSet", "pool-node"]["selector"]
