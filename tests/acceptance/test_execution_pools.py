"""Which execution pools a node may use, and what it says about the others."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from kombu.utils.imports import symbol_by_name

from pool.errors import ConfigError
from pool.worker.execution import check_execution_pool
from tests.support.celery_nodes import WorkerNode, process_gone, run_celery
from tests.support.site import Producer, Site

Start = Callable[..., WorkerNode]


@pytest.mark.parametrize("execution", ["threads", "prefork", "solo"])
def test_run_build_is_warm_the_second_time_under(
    execution: str, start: Start, producer: Producer, site: Site, key: str
) -> None:
    """Each supported execution pool keeps a key's backend in one process, and leaves none behind when it stops."""
    node = start(env={"POOL_EXECUTION": execution})
    first, second = producer.built(key, "pwd"), producer.built(key, "pwd")
    assert (first["warm"], second["warm"]) == (False, True)
    assert first["pid"] == second["pid"]
    assert (first["pid"] == node.pid) == (execution != "prefork")
    assert second["output"].strip() == str(site.work(key))
    assert node.stop() == 0
    assert process_gone(first["pid"])
    assert not node.container.children()


def test_prefork_of_one_child_may_be_asked_for_twice(start: Start, producer: Producer, key: str) -> None:
    """``-c 1`` on the command line agrees with POOL_EXECUTION=prefork."""
    start(options=["-c", "1"], env={"POOL_EXECUTION": "prefork"})
    assert producer.built(key)["exit_code"] == 0


@pytest.mark.parametrize("options", [["-c", "2"], ["--autoscale", "3,1"]])
def test_prefork_with_several_children_is_refused_at_start(options: list[str], site: Site) -> None:
    """One key would have a backend in each child: the worker ends at once, and one line says what to do instead."""
    env = {**site.env, "POOL_EXECUTION": "prefork"}
    done = run_celery(["-A", "worker_config", "worker", *options], site.folder, env)
    assert_refused(done, "execution pool 'prefork' with", "POOL_EXECUTION=threads")


def test_the_check_comes_after_the_step_that_reads_the_number_of_children() -> None:
    """Celery makes its steps in the order that they require, and else in any: an ``--autoscale`` was seen or was not."""
    from celery.worker.components import Pool

    from pool.worker.bootsteps import BackendPoolStep

    assert [symbol_by_name(step) for step in BackendPoolStep.requires] == [Pool]


def test_a_concurrency_that_prefork_cannot_have_is_refused_at_start(site: Site) -> None:
    """POOL_CONCURRENCY=2 with prefork: the same, by the settings alone."""
    env = {**site.env, "POOL_EXECUTION": "prefork", "POOL_CONCURRENCY": "2"}
    done = run_celery(["-A", "worker_config", "worker"], site.folder, env)
    assert done.returncode != 0
    assert "concurrency=2 with execution='prefork': must be 1" in done.stdout + done.stderr


@pytest.mark.parametrize("green", ["gevent", "eventlet"])
def test_green_threads_are_refused_with_a_reason(green: str) -> None:
    """The check that runs at start; gevent and eventlet themselves need not be installed for that."""
    cls = type("TaskPool", (), {"__module__": f"celery.concurrency.{green}"})
    with pytest.raises(ConfigError, match=f"execution pool '{green}': .*Use POOL_EXECUTION=threads"):
        check_execution_pool(SimpleNamespace(pool_cls=cls, concurrency=1))


@pytest.mark.parametrize("green", ["gevent", "eventlet"])
def test_a_worker_asked_for_green_threads_does_not_start(green: str, site: Site) -> None:
    """Whether or not the package is there."""
    done = run_celery(["-A", "worker_config", "worker", "-P", green], site.folder, site.env)
    assert done.returncode != 0
    assert " ready." not in done.stdout + done.stderr


def assert_refused(done, *texts: str) -> None:
    """It failed, with one line of error that holds *texts*, and never came up."""
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert "Traceback" not in output
    assert " ready." not in output
    (line,) = [line for line in output.splitlines() if line.startswith("Error:")]
    for text in texts:
        assert text in line
