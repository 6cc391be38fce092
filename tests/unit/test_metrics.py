"""Metrics: what is counted, what a scrape shows, and that documents, dashboard and alerts name nothing else."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pool import BackendPoolManager, MemoryBackend
from pool.metric_families import MAX_SERIES, Tally
from pool.metrics import LAG_WINDOW, LoopLag, NodeMetrics, PoolMetrics, merge
from pool.observer import Observer, Observers, Step
from pool.runtime import LoopThread
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "backend-pool.json"
KEY = "canary-key"

SNAPSHOT = {"backends": {("idle", "ssh"): 3, ("connecting", ""): 1}, "waiting": 2, "oldest_busy_s": 1.5}
NODE = {"shards": 7, "shards_suspended": 2, "shards_total": 64, "lease_age_s": 0.4, "draining": True}


def step(what: Any, reason: str = "", seconds: float = 0.2) -> Step:
    return Step(what, KEY, "default", "ssh", reason, seconds)


def observe_everything(observer: Observer) -> None:
    """Tell of each thing once."""
    observer.step(step("created"))
    observer.step(step("failed", "refused"))
    observer.step(step("evicted", "lru"))
    observer.step(step("retired", "config"))
    observer.step(step("closed", "config"))
    observer.acquired(KEY, "default", 0.0, warm=True)
    observer.acquired(KEY, "default", 0.3, warm=False)
    observer.acquired(KEY, "default", 30.0, warm=False, error="AcquireTimeout")
    observer.connected(KEY, "default", "ssh", 0.2)
    observer.executed("ssh", 2.0, "failed")


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("metrics-test")
    yield thread
    thread.stop()


@pytest.fixture
def metrics(loop: LoopThread) -> PoolMetrics:
    """A pool's metrics that have seen each thing once."""
    metrics = PoolMetrics(lambda: SNAPSHOT)
    metrics.watch_loop(loop.loop)
    observe_everything(metrics)
    return metrics


@pytest.fixture
def node() -> NodeMetrics:
    """A node's metrics that have seen each thing once."""
    node = NodeMetrics(lambda: NODE, lease_ttl=5.0)
    node.handed_over(0.2)
    node.took_over(4.0)
    return node


@pytest.fixture
def text(metrics: PoolMetrics, node: NodeMetrics) -> str:
    """What the server of a node would send."""
    return merge(metrics.render(), node.render()).decode()


def samples(text: str) -> dict[str, float]:
    """Every sample, written as Prometheus does."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def families(text: str) -> dict[str, tuple[str, str, frozenset[str]]]:
    """For each metric, by the name that its type gives it: type, meaning and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        labels = frozenset(name for sample in family.samples for name in sample.labels) - {"le"}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, family.documentation, labels)
    return found


# -- what is counted


def test_everything_observed_is_shown(text: str) -> None:
    """Each call of an observer comes out under its name, with its labels, and a connect is counted once."""
    shown = samples(text)
    for sample, value in {
        'backend_pool_acquire_seconds_count{warm="true"}': 1,
        'backend_pool_acquire_seconds_sum{warm="false"}': 0.3,
        'backend_pool_acquire_errors_total{error="AcquireTimeout"}': 1,
        "backend_pool_warm_hits_total": 1,
        "backend_pool_warm_misses_total": 1,
        'backend_pool_connect_seconds_count{kind="ssh"}': 1,
        'backend_pool_connect_failures_total{reason="refused"}': 1,
        'backend_pool_exec_seconds_sum{kind="ssh",outcome="failed"}': 2,
        'backend_pool_creations_total{kind="ssh"}': 1,
        'backend_pool_evictions_total{reason="lru"}': 1,
        'backend_pool_retirements_total{reason="config"}': 1,
        'backend_pool_closes_total{reason="config"}': 1,
        'backend_pool_backends{kind="ssh",state="idle"}': 3,
        'backend_pool_backends{kind="unknown",state="connecting"}': 1,
        "backend_pool_waiters": 2,
        "backend_pool_oldest_busy_seconds": 1.5,
        "backend_pool_shards_owned": 7,
        "backend_pool_shards_suspended": 2,
        "backend_pool_shards": 64,
        "backend_pool_lease_age_seconds": 0.4,
        "backend_pool_lease_ttl_seconds": 5,
        "backend_pool_draining": 1,
        "backend_pool_handoff_seconds_sum": 0.2,
        "backend_pool_takeover_seconds_count": 1,
    }.items():
        assert shown[sample] == value, sample
    assert "backend_pool_loop_lag_seconds" in shown


def test_no_key_is_ever_shown(text: str) -> None:
    """Neither as a label nor elsewhere."""
    assert KEY not in text


def test_buckets_are_cumulative_and_hold_their_upper_bound() -> None:
    """As Prometheus reads them: a value on a bound counts as up to it."""
    tally = Tally((1.0, 5.0))
    for seconds in (0.5, 1.0, 5.0, 9.0):
        tally.observe(seconds)
    assert tally.buckets() == ([("1.0", 2), ("5.0", 3), ("+Inf", 4)], 15.5)


def test_nothing_is_lost_between_threads() -> None:
    """Eight threads observe at once; all of it is counted."""
    metrics = PoolMetrics(dict)

    def work() -> None:
        for _ in range(2000):
            metrics.acquired(KEY, "default", 0.5, warm=True)
            metrics.executed("ssh", 0.5, "ok")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shown = samples(metrics.render().decode())
    assert shown["backend_pool_warm_hits_total"] == 16000
    assert shown['backend_pool_acquire_seconds_sum{warm="true"}'] == 8000
    assert shown['backend_pool_exec_seconds_count{kind="ssh",outcome="ok"}'] == 16000


def test_known_reasons_start_at_zero() -> None:
    """Or the first failure would have no rate."""
    shown = samples(PoolMetrics(dict).render().decode())
    assert shown['backend_pool_connect_failures_total{reason="host_key"}'] == 0
    assert shown['backend_pool_evictions_total{reason="idle"}'] == 0
    assert shown['backend_pool_retirements_total{reason="key_closed"}'] == 0


def test_a_backend_that_makes_up_reasons_cannot_flood_prometheus() -> None:
    """The number of series is bounded; the rest is counted together."""
    metrics = PoolMetrics(dict)
    for number in range(3 * MAX_SERIES):
        metrics.step(step("failed", f"made-up-{number}"))
    reasons = [name for name in samples(metrics.render().decode()) if name.startswith("backend_pool_connect_failures")]
    assert len(reasons) <= MAX_SERIES + 1
    assert samples(metrics.render().decode())['backend_pool_connect_failures_total{reason="other"}'] > MAX_SERIES


# -- gauges


def test_a_state_that_is_empty_again_is_shown_as_zero() -> None:
    """A gauge that just vanishes would look like its last value."""
    now: dict[str, Any] = {"backends": {("busy", "ssh"): 4}}
    metrics = PoolMetrics(lambda: now)
    metrics.render()
    now["backends"] = {("idle", "ssh"): 4}
    shown = samples(metrics.render().decode())
    assert shown['backend_pool_backends{kind="ssh",state="busy"}'] == 0
    assert shown['backend_pool_backends{kind="ssh",state="idle"}'] == 4


def test_a_snapshot_that_fails_hides_only_what_comes_from_it(caplog: pytest.LogCaptureFixture) -> None:
    """The counters are still there; the log says why the gauges are not."""

    def fail() -> dict[str, Any]:
        raise RuntimeError("the pool is closed")

    metrics = PoolMetrics(fail)
    metrics.acquired(KEY, "default", 0.0, warm=True)
    shown = samples(metrics.render().decode())
    assert shown["backend_pool_warm_hits_total"] == 1
    assert "backend_pool_waiters" not in shown
    assert "the pool is closed" in caplog.text


def test_no_snapshot_is_taken_before_the_first_scrape() -> None:
    """The pool may not be there yet when its metrics are made."""
    taken: list[int] = []

    def snapshot() -> dict[str, Any]:
        taken.append(1)
        return {}

    metrics, node = PoolMetrics(snapshot), NodeMetrics(snapshot)
    assert not taken
    metrics.render()
    node.render()
    assert len(taken) == 2


def test_static_placement_shows_no_lease() -> None:
    """An age of None is no sample, not 0."""
    shown = samples(NodeMetrics(lambda: {**NODE, "lease_age_s": None}).render().decode())
    assert "backend_pool_lease_age_seconds" not in shown
    assert "backend_pool_lease_ttl_seconds" not in shown
    assert shown["backend_pool_shards_owned"] == 7


def test_the_registries_have_no_name_in_common(metrics: PoolMetrics, node: NodeMetrics) -> None:
    """So their texts can be joined."""
    assert not set(families(metrics.render().decode())) & set(families(node.render().decode()))


def test_merge_joins_whole_lines() -> None:
    """A text without a newline at its end, and an empty one, do no harm."""
    assert merge(b"a 1", b"", b"b 2\n") == b"a 1\nb 2\n"


# -- the event loop


def test_a_blocked_loop_is_seen_while_it_is_blocked_and_afterwards(loop: LoopThread) -> None:
    """The delay grows as long as it lasts, and stays for the window."""
    lag = LoopLag(loop.loop)
    lag.start()
    wait_until(lambda: lag._late, "the loop was looked at")
    assert lag.worst() < 5
    go = threading.Event()
    loop.loop.call_soon_threadsafe(go.wait, 30)
    wait_until(lambda: lag.worst() > 0.3, "the block is seen before it ends")
    go.set()
    looks = len(lag._late)
    wait_until(lambda: len(lag._late) > looks, "the loop was looked at again")
    assert lag.worst() > 0.3
    lag.stop()


def test_an_old_delay_is_forgotten() -> None:
    """What is shown is the worst of the window."""
    other = asyncio.new_event_loop()
    lag = LoopLag(other)
    lag._late.append((-LAG_WINDOW, 7.0))
    assert lag.worst() == 0.0
    other.close()


# -- observers


class Broken(Observer):
    def step(self, step: Step) -> None:
        raise RuntimeError("broken")

    acquired = connected = executed = step  # type: ignore[assignment]


def test_a_broken_observer_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """Its exceptions are logged, and nothing is raised."""
    metrics = PoolMetrics(dict)
    observe_everything(Observers(Broken(), metrics, Broken()))
    shown = samples(metrics.render().decode())
    assert shown["backend_pool_warm_hits_total"] == 1
    assert shown['backend_pool_exec_seconds_count{kind="ssh",outcome="failed"}'] == 1
    assert caplog.text.count("an observer of the pool failed") == 20


def test_a_broken_observer_keeps_no_backend_from_its_user(caplog: pytest.LogCaptureFixture) -> None:
    """Cold or warm; the backend is given back as ever."""
    pool = BackendPoolManager(MemoryBackend, observer=Broken())
    for warm in (False, True):
        with pool.acquire_backend("a") as borrowed:
            assert borrowed.warm == warm
    assert pool.get_stats().active_backends == 0
    assert caplog.text.count("an observer of the pool failed") == 4  # created, connected, acquired twice
    pool.destroy_all(grace=0)


# -- the optional dependency


def run_python(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_prometheus_client_the_error_says_what_to_install() -> None:
    """And the module can be imported all the same."""
    said = run_python(
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from pool.metrics import NodeMetrics, PoolMetrics\n"
        "from pool import ConfigError\n"
        "for make in (PoolMetrics, NodeMetrics):\n"
        "    try: make(dict)\n"
        "    except ConfigError as error: print(error)\n"
    )
    assert said.count("pip install celery-warm-pool[metrics]") == 2


def test_importing_the_metrics_imports_no_client_and_no_celery() -> None:
    """Who serves none does not pay for them, and the pool core stays what it is."""
    heavy = "{'prometheus_client', 'opentelemetry', 'celery', 'kombu', 'redis'}"
    said = run_python(f"import pool.metrics, pool.tracing, sys; print({heavy} & set(sys.modules))")
    assert said == "set()\n"


# -- documents, dashboard, alerts


def documented() -> dict[str, tuple[str, str, frozenset[str]]]:
    rows = re.findall(r"^\| `(backend_pool_\w+)` \| (\w+) \| ([\w, ]*?) ?\| (.+?) \| (.+?) \|$", DOC, re.MULTILINE)
    for name, kind, _, unit, _ in rows:
        assert (unit == "seconds") == ("_seconds" in name), name
        assert kind != "counter" or name.endswith("_total")
    return {
        name: (kind, meaning, frozenset(labels.replace(",", " ").split())) for name, kind, labels, _, meaning in rows
    }


DOC = (ROOT / "docs" / "metrics.md").read_text()


def test_the_document_lists_exactly_the_metrics_that_there_are(text: str) -> None:
    """Names, types, labels and meanings, with the units in the names."""
    assert documented() == families(text)


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bbackend_pool_\w+", expression))


def dashboard_expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    queries = [variable["query"]["query"] for variable in board["templating"]["list"]]
    return queries + [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def sample_names(text: str) -> set[str]:
    return {name.partition("{")[0] for name in samples(text)}


def test_every_metric_of_the_dashboard_and_the_alerts_exists(text: str) -> None:
    """With the suffixes that its type gives it: a panel without data looks like a quiet system."""
    expressions = dashboard_expressions() + [rule["expr"] for rule in alerts()]
    assert len(expressions) > 30
    for expression in expressions:
        assert named(expression), expression
        assert named(expression) <= sample_names(text), expression


def test_the_dashboard_uses_labels_that_exist(text: str) -> None:
    """What it groups by and what it writes into legends are labels of the metrics beside them."""
    known = families(text)
    board = json.loads(DASHBOARD.read_text())
    for target in (target for panel in board["panels"] for target in panel.get("targets", [])):
        bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named(target["expr"])}
        labels = {"instance", "le"}.union(*(known[base][2] for base in bases))
        used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        for grouped in re.findall(r"by \(([^)]*)\)", target["expr"]):
            used |= set(grouped.replace(",", " ").split())
        assert used <= labels, target["expr"]


def test_every_metric_is_on_the_dashboard(text: str) -> None:
    """None is collected for nobody."""
    shown = named(" ".join(dashboard_expressions()))
    for name, (kind, _, _) in families(text).items():
        assert shown & ({f"{name}_bucket", f"{name}_count"} if kind == "histogram" else {name}), name


def test_every_alert_says_what_it_means_and_is_documented() -> None:
    """A summary, a description, a severity, and a row that says what to do."""
    rows = re.findall(r"^\| `(BackendPool\w+)` \| .+ \| .+ \|$", DOC, re.MULTILINE)
    assert rows == [rule["alert"] for rule in alerts()]
    for rule in alerts():
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_panels_have_ids_and_places_of_their_own() -> None:
    """Two panels in one place would hide each other."""
    places = set()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, panel["title"]
        assert at["x"] + at["w"] <= 24
        places |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
