"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pool
from pool.helper.bundle import _MODULES

ROOT = Path(pool.__file__).parents[1]
CORE = (
    "manager lifecycle groups room invariants entry borrowing runtime config errors stats keys hosts chats observer"
    " snapshot interrupt metrics metric_families metrics_server tracing"
).split()
SOURCES = sorted([*(ROOT / "pool").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Every import of a file, at any depth: ``(module, name)``; type-checking ones too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def modules(path: Path) -> set[str]:
    """Top-level names of what a file imports."""
    return {module.split(".")[0] for module, _ in imports(path)}


def inside(path: Path) -> set[str]:
    """Modules of this project that a file imports: ``from pool import errors`` counts as ``pool.errors``."""
    found = set()
    for module, attribute in imports(path):
        inner = f"{module}.{attribute}"
        is_module = (ROOT / (inner.replace(".", "/") + ".py")).exists() or (ROOT / inner.replace(".", "/")).is_dir()
        found.add(inner if attribute and is_module else module)
    return {module for module in found if module.split(".")[0] in ("pool", "tasks", "worker_config")}


CORE_FILES = [*(ROOT / "pool" / f"{module}.py" for module in CORE), *sorted((ROOT / "pool" / "backends").glob("*.py"))]


def test_the_reader_of_imports_sees_what_there_is():
    """Or the laws below would hold of nothing."""
    assert len(CORE_FILES) > 15
    assert "celery" in modules(ROOT / "pool" / "worker" / "task.py")
    assert "pool.errors" in inside(ROOT / "pool" / "manager.py")


@pytest.mark.parametrize("path", CORE_FILES, ids=name)
def test_the_pool_core_knows_neither_celery_nor_redis(path):
    """The backend pool works in any program."""
    assert not modules(path) & {"celery", "kombu", "redis", "billiard", "vine"}
    assert not {module for module in inside(path) if module.startswith(("pool.worker", "pool.embedded", "tasks"))}


@pytest.mark.parametrize("path", sorted((ROOT / "pool" / "sharding").glob("*.py")), ids=name)
def test_sharding_decisions_need_the_standard_library_only(path):
    """Drivers that talk to a store are the named exceptions."""
    allowed = {"redis_store": {"redis"}, "coordinator": {"redis"}}.get(path.stem, set())
    foreign = modules(path) - set(sys.stdlib_module_names) - {"pool"} - allowed
    assert not foreign
    if not allowed:
        assert not {module for module in inside(path) if not module.startswith("pool.sharding")}


SENT = [path for path in sorted((ROOT / "pool" / "helper").glob("*.py")) if path.stem not in ("__init__", "bundle")]


@pytest.mark.parametrize("path", SENT, ids=name)
def test_what_is_sent_to_hosts_needs_the_standard_library_and_what_was_sent_before(path):
    """There is nothing else there; `bundle` stays with the worker."""
    assert not modules(path) - set(sys.stdlib_module_names) - {"pool"}
    assert inside(path) <= {f"pool.helper.{module}" for module in _MODULES[: _MODULES.index(path.stem)]}


@pytest.mark.parametrize("path", sorted((ROOT / "tasks").glob("*.py")), ids=name)
def test_tasks_use_what_pool_exports_and_nothing_behind_it(path):
    """They are written as a user would write them."""
    for module, attribute in imports(path):
        top = module.split(".")[0]
        if top == "pool":
            assert module == "pool", f"{module} is not public"
            assert attribute in pool.__all__
        else:
            assert top in {*sys.stdlib_module_names, "celery", "tasks"}, module


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nobody_imports_the_composition_root(path):
    """It imports everybody."""
    assert "worker_config" not in modules(path)


@pytest.mark.parametrize("path", sorted((ROOT / "pool").rglob("*.py")), ids=name)
def test_the_extension_does_not_import_tasks(path):
    """Tasks use the extension, not the other way round."""
    assert "tasks" not in modules(path)


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("celery", "kombu", "redis", "billiard"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import pool
pool.BackendPoolManager, pool.LocalFilesystemBackend, pool.RemoteFilesystemBackend, pool.Settings
import pool.hosts
with pool.BackendPoolManager(pool.MemoryBackend).backend("a") as backend:
    backend.write("f", "text")
    print(backend.read("f"))
print(sorted({"celery", "kombu", "redis"} & set(sys.modules)))
"""


def test_the_pool_works_without_celery_and_redis():
    """In a process where they cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "text\n[]\n", done.stderr


def test_importing_pool_imports_little():
    """A producer pays for what it uses."""
    script = "import pool, sys; print(sorted({'celery', 'asyncssh', 'redis', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[]\n", done.stderr


def test_who_has_no_ssh_host_does_not_pay_for_ssh():
    """A producer, or a command line, that only sends tasks: a third of a second of asyncssh."""
    script = "import pool.worker.install, pool.hosts, sys; print(sorted({'asyncssh'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[]\n", done.stderr
