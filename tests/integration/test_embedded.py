import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import pool
from pool import embedded
from pool.embedded import EmbeddedValkey, embedded_url, stop
from pool.errors import ConfigError
from tests.support.waiting import wait_until

ROOT = Path(pool.__file__).parents[1]

# Prints its URL and uses the server until its stdin ends.
USER = """
import sys
from pathlib import Path
from pool.embedded import embedded_url
print(embedded_url(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""

# The same, and forks a child that ends in the ordinary way, exit handlers included, before it prints.
FORKING_USER = """
import os, sys
from pathlib import Path
from pool.embedded import embedded_url
url = embedded_url(Path(sys.argv[1]))
if os.fork() == 0:
    sys.exit(0)
os.wait()
print(url, flush=True)
sys.stdin.read()
"""

User = subprocess.Popen[str]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A data folder that does not exist yet; its server is gone after the test."""
    folder = tmp_path / "data"
    yield folder
    stop(folder)
    assert servers(folder) == []


@pytest.fixture
def start_user(folder: Path) -> Iterator[Callable[..., User]]:
    """Start a real process that uses the server of the folder; all are gone after the test."""
    users: list[User] = []

    def start(program: str = USER) -> User:
        command = [sys.executable, "-c", program, str(folder)]
        users.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return users[-1]

    yield start
    for user in users:
        user.kill()
        user.communicate()


def url_of(user: User) -> str:
    assert user.stdout is not None
    return user.stdout.readline().strip()


def leave(user: User) -> None:
    """End the process gracefully."""
    user.communicate(timeout=20)
    assert user.returncode == 0


def servers(folder: Path) -> list[int]:
    """The process ids of all servers that work in the folder, whatever its files say."""
    found = []
    for process in psutil.process_iter(["name", "cwd", "status"]):
        if process.info["name"] == "valkey-server" and process.info["cwd"] == str(folder.resolve()):
            found.append(process.pid)
    return found


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, decode_responses=True)


def test_processes_that_start_together_share_one_server(folder: Path, start_user: Callable[..., User]) -> None:
    """Six processes at once get one URL, and there is one server."""
    users = [start_user() for _ in range(6)]
    urls = {url_of(user) for user in users}
    assert len(urls) == 1
    assert urls.pop().startswith("redis://:")
    assert len(servers(folder)) == 1


def test_threads_that_start_together_share_one_server(folder: Path) -> None:
    """Eight threads of one process at once get one URL, and there is one server."""
    urls: list[str] = []
    threads = [threading.Thread(target=lambda: urls.append(embedded_url(folder))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(urls) == 8
    assert len(set(urls)) == 1
    assert len(servers(folder)) == 1


def test_server_of_a_killed_starter_is_used_again(folder: Path, start_user: Callable[..., User]) -> None:
    """After kill -9 of the starter its server goes on; the next process finds it and, as the last user, stops it."""
    first = start_user()
    url = url_of(first)
    (server,) = servers(folder)
    first.kill()
    first.wait()
    assert servers(folder) == [server]
    second = start_user()
    assert url_of(second) == url
    assert servers(folder) == [server]
    leave(second)
    assert servers(folder) == []


def test_server_is_found_when_its_starter_was_killed_before_it_knew_the_process(folder: Path) -> None:
    """What is known before the start, the port, is enough to find a left-over server, and to stop it."""
    url = embedded_url(folder)
    (server,) = servers(folder)
    state = folder / "server.json"
    state.write_text(json.dumps({"port": urlsplit(url).port, "pid": 0, "started": ""}))
    assert embedded_url(folder) == url
    assert json.loads(state.read_text())["pid"] == server
    assert stop(folder)


def test_two_servers_never_share_a_folder(folder: Path) -> None:
    """A server that the state file does not know keeps the folder: a second one would ruin its data."""
    embedded_url(folder)
    (server,) = servers(folder)
    state = folder / "server.json"
    known = state.read_text()
    state.unlink()
    with pytest.raises(ConfigError, match="does not know"):
        embedded_url(folder)
    assert servers(folder) == [server]
    state.write_text(known)


def test_last_graceful_exit_stops_the_server(folder: Path, start_user: Callable[..., User]) -> None:
    """A process that leaves while another still uses the server does not stop it; the last one does."""
    first, second = start_user(), start_user()
    url = url_of(first)
    assert url_of(second) == url
    leave(first)
    assert client(url).ping()
    leave(second)
    assert servers(folder) == []


def test_exit_of_a_forked_child_does_not_stop_the_server(folder: Path, start_user: Callable[..., User]) -> None:
    """A forked child that runs its parent's exit handlers takes nothing from the parent."""
    user = start_user(FORKING_USER)
    url = url_of(user)
    assert client(url).ping()
    other = start_user()
    assert url_of(other) == url
    leave(other)  # not the last user: the child must not have given up the parent's share either
    assert client(url).ping()
    leave(user)
    assert servers(folder) == []


def test_server_outlives_the_process_group_of_its_starter(folder: Path, start_user: Callable[..., User]) -> None:
    """Ctrl-C in a terminal reaches the workers, not the server."""
    user = start_user()
    url_of(user)
    (server,) = servers(folder)
    assert os.getsid(server) != os.getsid(user.pid)
    assert os.getpgid(server) != os.getpgid(user.pid)
    assert psutil.Process(server).ppid() != user.pid


def test_data_survives_stop_and_start(folder: Path) -> None:
    """What was written is there after the server was stopped and started again, at the same URL."""
    url = embedded_url(folder)
    client(url).set("chat", "42")
    assert stop(folder)
    assert servers(folder) == []
    assert embedded_url(folder) == url
    assert client(url).get("chat") == "42"


def test_data_survives_a_killed_server(folder: Path) -> None:
    """A server that was killed is replaced at once, and a second later at most its data is on disk."""
    url = embedded_url(folder)
    client(url).set("chat", "42")
    wait_until(lambda: client(url).info("persistence")["aof_pending_bio_fsync"] == 0, "the AOF is written")
    (server,) = servers(folder)
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: servers(folder) == [], "the server has ended")
    assert embedded_url(folder) == url
    assert client(url).get("chat") == "42"


def test_stop_without_a_server_says_so(folder: Path) -> None:
    """No folder, no server and a stopped server all give False, and the folder is not made."""
    assert not stop(folder)
    assert not folder.exists()
    embedded_url(folder)
    assert stop(folder)
    assert not stop(folder)


@pytest.mark.parametrize("started", ["1", "true"])
def test_stale_state_file_with_a_reused_pid_is_not_trusted(folder: Path, started: str) -> None:
    """A state file that names a process of somebody else is replaced, and that process is not touched."""
    folder.mkdir(mode=0o700)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        birth = embedded._birth(os.getpid()) if started == "true" else started
        (folder / "server.json").write_text(json.dumps({"port": port, "pid": os.getpid(), "started": birth}))
        assert not stop(folder)
        url = embedded_url(folder)
        assert urlsplit(url).port != port
        (server,) = servers(folder)
        assert json.loads((folder / "server.json").read_text())["pid"] == server


def test_stuck_server_is_neither_replaced_nor_left(folder: Path) -> None:
    """A frozen server keeps its folder, the error says that it does not answer, and stop() reaches it by its process."""
    embedded_url(folder)
    (server,) = servers(folder)
    os.kill(server, signal.SIGSTOP)
    try:
        with pytest.raises(ConfigError, match="does not answer"):
            embedded_url(folder, timeout=0.1)
        assert servers(folder) == [server]
    finally:
        stopping = threading.Thread(target=stop, args=[folder])
        stopping.start()
        pending = Path(f"/proc/{server}/status")
        wait_until(lambda: "ShdPnd:\t0000000000004000" in pending.read_text(), "SIGTERM is pending")
        os.kill(server, signal.SIGCONT)
        stopping.join()
    assert servers(folder) == []


def test_stranger_on_the_last_port_is_not_told_the_password(folder: Path) -> None:
    """If somebody else took the port of the stopped server, the new one gets another, and nobody connects to him."""
    old = urlsplit(embedded_url(folder)).port
    assert stop(folder)
    with socket.create_server(("127.0.0.1", old)) as stranger:
        url = embedded_url(folder)
        assert urlsplit(url).port != old
        assert client(url).ping()
        stranger.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            stranger.accept()


def test_port_that_is_taken_just_before_the_server_binds_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server that found its port in use is started again, with another one."""
    free_ports = EmbeddedValkey._ports
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        monkeypatch.setattr(EmbeddedValkey, "_ports", lambda self: chain([taken], free_ports(self)))
        url = embedded_url(folder)
    assert urlsplit(url).port != taken
    assert client(url).ping()


def test_password_is_needed_and_only_this_machine_reaches_it(folder: Path) -> None:
    """Without the password nothing works; the server listens on the loopback address only and its command line tells nothing."""
    url = urlsplit(embedded_url(folder))
    assert url.hostname == "127.0.0.1"
    assert len(url.password or "") >= 32
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(host="127.0.0.1", port=url.port, retry=Retry(NoBackoff(), 0)).ping()
    process = psutil.Process(servers(folder)[0])
    listening = [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]
    assert url.password not in " ".join(process.cmdline())
    assert url.password not in " ".join(process.environ().values())


def test_files_are_for_their_owner_only(folder: Path) -> None:
    """The folder is 0700, everything in it 0600 (0700 for folders)."""
    client(embedded_url(folder)).set("chat", "42")
    modes = {path: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    assert {"secret", "server.json", "valkey.conf", "valkey.log", "users.lock"} <= {path.name for path in modes}
    assert {path: mode for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}


def test_server_is_configured_as_a_broker(folder: Path) -> None:
    """Everything is kept (AOF, each second), nothing is evicted, no snapshots."""
    config = client(embedded_url(folder)).config_get()
    wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}
    assert {name: config[name] for name in wanted} == wanted


def test_two_folders_are_two_servers(folder: Path, tmp_path: Path) -> None:
    """Each folder has its own server, with its own password."""
    other = tmp_path / 'with "quotes" and spaces'
    try:
        first, second = urlsplit(embedded_url(folder)), urlsplit(embedded_url(other))
        assert first.port != second.port
        assert first.password != second.password
    finally:
        stop(other)


def test_folder_that_is_a_file_is_a_config_error(tmp_path: Path) -> None:
    """The error names the folder."""
    (tmp_path / "file").touch()
    for broken in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"data folder {broken} cannot be used"):
            embedded_url(broken)


def test_folder_that_others_may_write_to_is_refused(folder: Path) -> None:
    """Who can put a file into the folder could run tasks as us."""
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        embedded_url(folder)
    folder.chmod(0o700)


def test_server_that_does_not_start_shows_its_log(folder: Path) -> None:
    """The error has what the server said."""
    embedded_url(folder)
    stop(folder)
    (manifest,) = folder.glob("appendonlydir/*.manifest")
    manifest.write_text("nonsense\n")
    with pytest.raises(ConfigError, match=r"(?s)did not start.*Invalid AOF manifest"):
        embedded_url(folder)


def test_platform_without_a_binary_is_told_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that POOL_BROKER_URL is the way out."""
    monkeypatch.setattr("platform.system", lambda: "Plan9")
    with pytest.raises(ConfigError, match=r"plan9.*POOL_BROKER_URL"):
        embedded_url(folder)


def test_start_lock_that_is_never_released_is_a_config_error(folder: Path) -> None:
    """Nobody waits longer than the timeout."""
    folder.mkdir(mode=0o700)
    with EmbeddedValkey(folder).alone(0.0), pytest.raises(ConfigError, match=r"start\.lock"):
        embedded_url(folder, timeout=0.1)
