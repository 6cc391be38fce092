"""The doctor with real servers, hosts, nodes and processes: what is wrong is found, what is right is not blamed."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from pool import Settings, embedded, install
from pool.backends.leftovers import owner
from pool.backends.shell import MARK
from pool.doctor import Finding, diagnose, worst
from pool.doctor.checks import examine
from pool.doctor.deployment import Deployment
from pool.doctor.hosts import hosts_checks
from pool.loopback_sshd import LoopbackSshd
from pool.sharding.redis_store import keys_of
from pool.worker.claims import Claims
from tests.support.celery_nodes import WorkerNode, bare_environment
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.processes import is_gone, wait_gone
from tests.support.proxy import Proxy
from tests.support.rabbitmq import RabbitServer
from tests.support.services import require_service
from tests.support.site import Site, close_app
from tests.support.waiting import wait_until

PATIENCE = 6.0
"""Seconds for each check, where it should succeed: the machine may be busy."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.teardown()


@pytest.fixture
def client(site: Site) -> Iterator[Any]:
    """The site's Valkey, empty before and after, with the configuration that it had."""
    with site.redis() as client:
        client.flushall()
        kept = {name: client.config_get(name)[name] for name in ("maxmemory-policy", "maxmemory", "appendonly", "save")}
        yield client
        for name, value in kept.items():
            client.config_set(name, value)
        client.flushall()


@pytest.fixture
def deployed(site: Site) -> Iterator[Any]:
    """Apps on the site's Valkey, closed with the test."""
    apps = []

    def deployed(broker: str | None = None, *, conf: dict[str, Any] | None = None, **settings: Any) -> Celery:
        broker = broker or site.valkey.url
        app = Celery(
            "doctor", broker=broker, backend=settings.get("redis_url") or site.valkey.url, set_as_current=False
        )
        app.conf.update(accept_content=["json"], result_expires=3600, worker_send_task_events=True, **(conf or {}))
        install(app, Settings(**{"broker_url": broker, "data_dir": site.data, **settings}))
        apps.append(app)
        return app

    yield deployed
    for app in apps:
        close_app(app)


def blamed(found: list[Finding], *expected: str) -> dict[str, Finding]:
    """The findings that say more than ok, by code; without those *expected* of a place where no node runs."""
    return {f.code: f for f in found if f.level != "ok" and f.code not in ("no-nodes", *expected)}


# -- everything as it should be


def test_a_healthy_deployment_is_not_blamed(site: Site) -> None:
    """The embedded Valkey, one node, the app of a newcomer: nothing but ok."""
    node = site.start("healthy")
    try:
        node.ready()
        script = (
            "import json, sys; from dataclasses import asdict; import worker_config; from pool.doctor import diagnose\n"
            "wanted = sys.argv[1]\n"
            f"print(json.dumps([asdict(f) for f in diagnose(worker_config.app, timeout={PATIENCE})]))"
        )

        def look() -> list[dict[str, Any]]:
            command = [sys.executable, "-c", script, ""]
            env = {**bare_environment(), **site.env}
            done = subprocess.run(
                command, env=env, cwd=site.folder, capture_output=True, text=True, timeout=90, check=True
            )
            return json.loads(done.stdout)

        wait_until(lambda: "serving" in node.logs(), "the node serves", 60.0)
        found = look()
        assert [finding for finding in found if finding["level"] != "ok"] == []
        codes = {finding["code"] for finding in found}
        assert codes == {"broker", "redis", "hosts-file", "settings", "nodes", "messages", "processes"}
        [nodes] = [finding["what"] for finding in found if finding["code"] == "nodes"]
        assert nodes == "1 node on the broker; all 64 shards have an owner."
    finally:
        node.container.teardown()


# -- the broker and Redis


def test_servers_that_are_down_are_found_and_the_rest_goes_on(deployed: Any, tmp_path: Path) -> None:
    """One error for each of them, no exception, and no password."""
    url = "redis://:c4n4ry-secret@127.0.0.1:1/0"
    found = diagnose(deployed(url, redis_url=url, data_dir=tmp_path), timeout=PATIENCE)
    assert set(blamed(found)) == {"broker-unreachable", "redis-unreachable", "not-checked"}
    assert worst(found) == "error"
    assert {"settings", "hosts-file", "processes"} <= {finding.code for finding in found}
    assert "c4n4ry" not in json.dumps([asdict(finding) for finding in found])


def test_a_wrong_password_is_told_without_showing_it(deployed: Any, site: Site, tmp_path: Path) -> None:
    """As a login that was refused."""
    port = site.valkey.url.rpartition(":")[2]
    url = f"redis://:c4n4ry-secret@127.0.0.1:{port}"
    found = diagnose(deployed(url, redis_url=url, data_dir=tmp_path), timeout=PATIENCE)
    assert {"broker-unreachable", "redis-refused"} <= set(blamed(found))
    assert "c4n4ry" not in json.dumps([asdict(finding) for finding in found])


def test_a_frozen_server_does_not_hold_the_doctor_up(deployed: Any, site: Site) -> None:
    """It accepts connections and says nothing."""
    app = deployed()
    with site.valkey.frozen():
        started = time.monotonic()
        found = diagnose(app, timeout=1.0)
        assert time.monotonic() - started < 30.0  # a safety limit: each check has 1 s
    assert worst(found) == "error"
    assert {"redis-unreachable"} <= set(blamed(found))


def test_a_policy_that_evicts_is_found_and_fixed(deployed: Any, client: Any) -> None:
    """At run time; the finding says that the file needs it too. The second look finds nothing."""
    client.config_set("maxmemory-policy", "allkeys-lru")
    app = deployed()
    finding = blamed(diagnose(app, timeout=PATIENCE))["redis-eviction"]
    assert (finding.level, finding.fixed) == ("error", False)
    assert "allkeys-lru" in finding.what
    assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "allkeys-lru"
    finding = blamed(diagnose(app, fix=True, timeout=PATIENCE))["redis-eviction"]
    assert finding.fixed
    assert "configuration file" in finding.fix
    assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
    assert blamed(diagnose(app, timeout=PATIENCE)) == {}


def test_a_server_without_persistence_is_found(deployed: Any, client: Any) -> None:
    """Nothing at all is a warning, snapshots alone are worth a word."""
    app = deployed()
    client.config_set("appendonly", "no")
    assert {code: f.level for code, f in blamed(diagnose(app, timeout=PATIENCE)).items()} == {
        "redis-persistence": "warning"
    }
    client.config_set("save", "900 1")
    assert {code: f.level for code, f in blamed(diagnose(app, timeout=PATIENCE)).items()} == {"redis-snapshots": "info"}


def test_a_server_that_is_nearly_full_is_found(deployed: Any, client: Any) -> None:
    """With both numbers."""
    client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.02))
    assert "redis-memory" in blamed(diagnose(deployed(), timeout=PATIENCE))


def test_a_missing_redis_for_leases_is_found(deployed: Any) -> None:
    """Nodes would refuse to start; with static placement they would not."""
    app = deployed("memory://", redis_url=None)
    assert "redis-missing" in blamed(diagnose(app, timeout=PATIENCE))
    app = deployed("memory://", redis_url=None, node_shards=(1, 2))
    assert "redis-missing" not in blamed(diagnose(app, timeout=PATIENCE))


@pytest.mark.rabbitmq
def test_rabbitmq_queues_with_other_arguments_are_found(deployed: Any, rabbit: RabbitServer, site: Site) -> None:
    """None is made by looking; one that nodes cannot declare is named."""
    url = rabbit.vhost()
    app = deployed(url, redis_url=site.valkey.url, conf={"task_time_limit": 100})
    assert set(blamed(diagnose(app, timeout=PATIENCE))) <= {"rabbitmq-version"}
    with app.connection_for_write() as connection:
        with connection.channel() as channel, pytest.raises(connection.channel_errors):
            channel.queue_declare("pool.shard.003", passive=True)
        with connection.channel() as channel:
            channel.queue_declare("pool.shard.017", durable=True, auto_delete=False)
    finding = blamed(diagnose(app, timeout=PATIENCE))["queue-arguments"]
    assert finding.level == "error"
    assert "pool.shard.017" in finding.what
    assert "c4n4ry" not in finding.what


# -- hosts


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackSshd]:
    folder = tmp_path_factory.mktemp("sshd")
    with LoopbackSshd(folder / "keys", home=folder / "home") as server:
        yield server


def rule(sshd: Any, **changes: Any) -> str:
    fields = {
        "backend": "ssh",
        "host": "127.0.0.1",
        "port": sshd.info.port,
        "username": "builder",
        "root_dir": "never/{key}",
        "client_keys": str(sshd.info.client_key),
        "known_hosts": str(sshd.info.known_hosts),
        **changes,
    }
    return "[default]\n" + "".join(
        f"{name} = {json.dumps(value)}\n" for name, value in fields.items() if value is not None
    )


@pytest.fixture
def of_hosts(deployed: Any, tmp_path: Path) -> Any:
    """What is said about the hosts file and what is in it."""

    def of_hosts(text: str, timeout: float = PATIENCE) -> dict[str, Finding]:
        file = tmp_path / "hosts.toml"
        file.write_text('[default]\nbackend = "memory"\n')
        app = deployed(hosts_file=file)
        file.write_text(text)
        found = examine(hosts_checks(Deployment(app, fix=False, timeout=timeout)), timeout)
        return {finding.code: finding for finding in found}

    return of_hosts


def test_a_good_host_is_ok_and_nothing_is_made_there(of_hosts: Any, sshd: LoopbackSshd) -> None:
    """Host key, login, commands, files."""
    found = of_hosts(rule(sshd))
    assert {code: f.level for code, f in found.items()} == {"hosts-file": "ok", "host": "ok"}
    assert f"builder@127.0.0.1:{sshd.info.port}" in found["host"].what
    assert not (sshd.info.home / "never").exists()


def test_each_login_is_looked_at_once(of_hosts: Any, sshd: LoopbackSshd) -> None:
    """However many rules share it."""
    before = sshd.info.count_logins()
    text = rule(sshd) + "".join(
        rule(sshd, root_dir=f"r{n}").replace("[default]", f'[[match]]\nkey = "u{n}"') for n in range(3)
    )
    assert "host" in of_hosts(text)
    assert sshd.info.count_logins() == before + 1


def test_a_broken_file_is_an_error(of_hosts: Any) -> None:
    """In the words of the reader of hosts files."""
    finding = of_hosts("[default]\nbackend = 'local'\n")["hosts-file"]
    assert finding.level == "error"
    assert "hosts.toml: [default]" in finding.what


def test_an_unknown_host_key_is_found(of_hosts: Any, sshd: LoopbackSshd, tmp_path: Path) -> None:
    """And where to put the right one."""
    line = sshd.info.known_hosts.read_text().split()
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    (tmp_path / "known").write_text(f"{line[0]} {Path(f'{other}.pub').read_text()}")
    finding = of_hosts(rule(sshd, known_hosts=str(tmp_path / "known")))["host-key"]
    assert finding.level == "error"
    assert str(tmp_path / "known") in finding.fix


def test_a_refused_login_is_found(of_hosts: Any, sshd: LoopbackSshd, tmp_path: Path) -> None:
    """With the user's name; a user that was made up from a pattern need not exist."""
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    found = of_hosts(rule(sshd, client_keys=str(other)))
    assert found["host-login"].level == "error"
    assert "builder@127.0.0.1" in found["host-login"].what
    found = of_hosts(rule(sshd, client_keys=str(other), username="build-{key}"))
    assert found["host-account"].level == "info"
    assert "build-doctor@127.0.0.1" in found["host-account"].what


def test_closed_silent_and_foreign_ports_are_found(of_hosts: Any, sshd: LoopbackSshd, client: Any) -> None:
    """Nothing listens; something does and says nothing, or something else."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert "host-refused" in of_hosts(rule(sshd, port=probe.getsockname()[1]))
        probe.listen()
        assert "says nothing" in of_hosts(rule(sshd, port=probe.getsockname()[1]), timeout=1.0)["host-no-ssh"].what
    with socket.create_server(("127.0.0.1", 0)) as http:
        threading.Thread(target=_greet_as_mail, args=(http,), daemon=True).start()
        assert "does not greet" in of_hosts(rule(sshd, port=http.getsockname()[1]))["host-no-ssh"].what


def _greet_as_mail(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(b"220 mail\r\n")
        with contextlib.suppress(ConnectionResetError):
            connection.recv(100)


def test_a_name_that_nobody_knows_is_found(of_hosts: Any, sshd: LoopbackSshd) -> None:
    """By the system's resolver."""
    assert "host-resolve" in of_hosts(rule(sshd, host="no-such-host.invalid"))


def test_a_server_that_hangs_in_the_login_is_found(of_hosts: Any, tmp_path: Path) -> None:
    """It has greeted, and goes no further."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-mute\r\n")
                while connection.recv(4096):
                    pass

        threading.Thread(target=greet, daemon=True).start()
        text = f'[default]\nbackend = "ssh"\nhost = "127.0.0.1"\nport = {server.getsockname()[1]}\nusername = "u"\n'
        assert "host-timeout" in of_hosts(text, timeout=2.0)


def test_what_is_careless_is_a_warning(of_hosts: Any, sshd: LoopbackSshd, tmp_path: Path) -> None:
    """No host key, and a private key for everybody."""
    key = tmp_path / "key"
    shutil.copy(sshd.info.client_key, key)
    key.chmod(0o644)
    found = of_hosts(rule(sshd, insecure=True, known_hosts=None, client_keys=str(key)))
    assert {code: f.level for code, f in found.items()} == {
        "hosts-file": "ok",
        "key-permissions": "warning",
        "host-insecure": "warning",
        "host": "ok",
    }


def test_what_an_entry_names_must_be_there(of_hosts: Any, sshd: LoopbackSshd) -> None:
    """A key file; a variable."""
    assert "no_such_key" in of_hosts(rule(sshd, client_keys="/no_such_key"))["host-config"].what
    assert "NO_SUCH_VARIABLE" in of_hosts(rule(sshd, password_env="NO_SUCH_VARIABLE"))["host-config"].what


@pytest.mark.openssh
def test_a_host_without_files_or_commands_is_found(of_hosts: Any, tmp_path: Path) -> None:
    """A forced command in place of the shell; no SFTP subsystem; no python3 for the helper."""
    require_service("sshd", sshd_binary())
    shell = 'ForceCommand {} /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    for command, mode, expected in (
        ("ForceCommand exit 7", "auto", {"host-shell": "error"}),
        (shell.format("exec"), "auto", {"host": "ok"}),
        (shell.format("exec"), "channel", {"host-sftp": "warning"}),
        (shell.format("PATH=/nowhere"), "auto", {"host-helper": "info", "host-sftp": "warning"}),
        (shell.format("PATH=/nowhere"), "helper", {"host-helper": "error", "host-sftp": "warning"}),
    ):
        with OpenSshd(tmp_path / f"{mode}{len(expected)}{len(command)}", extra_config=[command]) as server:
            found = of_hosts(rule(server, username=server.info.username, exec_mode=mode))
        assert {code: f.level for code, f in found.items() if code != "hosts-file"} == expected
    assert "python3" in found["host-helper"].what


def test_an_agent_that_is_not_installed_is_found(of_hosts: Any, tmp_path: Path) -> None:
    """And one whose secret is missing; one that is there is not blamed."""
    agent = '[agents.{}]\nkind = "acp"\ncommand = ["{}"]\nroot_dir = "' + str(tmp_path) + '/{{key}}"\n'
    found = of_hosts(agent.format("good", "sh"))
    assert {code: f.level for code, f in found.items()} == {"hosts-file": "ok"}
    found = of_hosts(agent.format("bad", "no-such-agent"))
    assert "'no-such-agent'" in found["agent-command"].what
    found = of_hosts(agent.format("poor", "sh") + 'secrets = { KEY = { env = "NO_SUCH_VARIABLE" } }\n')
    assert "NO_SUCH_VARIABLE" in found["agent-secret"].what


def test_a_folder_that_cannot_be_made_is_found(of_hosts: Any, tmp_path: Path) -> None:
    """There is a file in its place."""
    (tmp_path / "file").write_text("")
    assert "folder" in of_hosts(f'[default]\nbackend = "local"\nroot_dir = "{tmp_path}/file/{{key}}"\n')


def test_no_finding_shows_the_password_of_a_host(
    deployed: Any, sshd: LoopbackSshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever becomes of the login."""
    monkeypatch.setenv("CANARY", "c4n4ry-secret")
    file = tmp_path / "hosts.toml"
    file.write_text(rule(sshd, client_keys=[], password_env="CANARY", username="c4n4ry-secret"))
    found = diagnose(deployed(hosts_file=file), timeout=PATIENCE)
    assert "host-login" in blamed(found)
    assert "c4n4ry" not in json.dumps([asdict(finding) for finding in found])


# -- nodes and what dead ones have left


@pytest.fixture
def start(site: Site, client: Any) -> Iterator[Any]:
    """Nodes that end with the test, frozen or not."""
    nodes: list[WorkerNode] = []

    def start(name: str, **kwargs: Any) -> WorkerNode:
        nodes.append(site.start(name, **kwargs))
        nodes[-1].ready()
        return nodes[-1]

    yield start
    for node in nodes:
        if node.container.status == "running":
            node.kill("SIGCONT")
        node.container.teardown()


def alive(client: Any) -> int:
    return int(client.zcard(keys_of("pool", "alive")[0]))


def owned(client: Any) -> int:
    return int(client.hlen(keys_of("pool", "leases")[0]))


def test_a_node_that_does_not_answer_is_found(deployed: Any, start: Any, client: Any) -> None:
    """It still holds leases, and its main thread stands still; others answer."""
    app = deployed(lease_ttl=60.0)
    silent, fine = (start(name, env={"POOL_LEASE_TTL": "60"}) for name in ("silent", "fine"))
    wait_until(lambda: owned(client) == 64, "all shards have owners", 60.0)
    silent.kill("SIGSTOP")
    found = blamed(diagnose(app, timeout=PATIENCE))
    assert set(found) == {"node-silent"}
    assert silent.hostname() in found["node-silent"].what
    assert fine.hostname() not in found["node-silent"].what


def test_a_dead_node_that_nobody_follows_is_found_with_its_messages(
    deployed: Any, start: Any, client: Any, site: Site
) -> None:
    """--fix puts back what it had taken, once it has been gone for long enough."""
    node = start("gone", env={"POOL_LEASE_TTL": "3"})
    wait_until(lambda: owned(client) == 64, "all shards have owners", 60.0)
    [incarnation] = client.hgetall(keys_of("pool", "members")[0])
    node.kill("SIGKILL")
    node.wait()
    claims = Claims("pool", incarnation)
    client.rpush("pool.shard.001", '{"body": "x", "headers": {}, "properties": {"delivery_info": {}}}')
    with redis.Redis.from_url(site.valkey.url) as raw:
        [claim], _ = claims.take(raw, ["pool.shard.001"], 1)
    assert client.llen("pool.shard.001") == 0
    app = deployed(lease_ttl=3.0)

    def dead() -> dict[str, Finding]:
        found = blamed(diagnose(app, timeout=3.0), "shards-unowned")
        return found if "node-dead" in found and "messages-left" in found else {}

    found = wait_until(dead, "it is taken for dead", 60.0)
    assert not found["messages-left"].fixed
    assert "had taken 1 message," in found["messages-left"].what
    fixed = wait_until(
        lambda: (f := blamed(diagnose(app, fix=True, timeout=3.0)).get("messages-left")) and f.fixed and f,
        "it is fixed",
        60.0,
    )
    assert "front of the queues: 1 message." in fixed.fix
    assert client.llen("pool.shard.001") == 1
    assert claim.payload
    assert "messages-left" not in blamed(diagnose(app, timeout=3.0))


def test_messages_are_put_back_only_where_the_table_is_sure(deployed: Any, client: Any) -> None:
    """Not from a table that knows nothing, not before a member has been gone for a TTL; then they are."""
    meta, alive, members = keys_of("pool", "meta", "alive", "members")
    app = deployed(lease_ttl=600.0)
    client.hset("pool.claimants", "n@h/1", "alive")
    client.hset("pool.claims.n@h/1", "1", "pool.shard.001\n{}")

    def fixed() -> bool:
        finding = blamed(diagnose(app, fix=True, timeout=PATIENCE))["messages-left"]
        assert finding.fixed == (client.llen("pool.shard.001") == 1) == (not client.exists("pool.claims.n@h/1"))
        return finding.fixed

    assert not fixed()
    client.hset(meta, mapping={"clock": 1000, "real": int(time.time() * 1000), "quarantine": 0, "shards": 64})
    client.zadd(alive, {"n@h/1": 900})
    client.hset(members, "n@h/1", "active n@h")
    assert not fixed()
    client.hset(meta, "quarantine", 1e9)
    client.hset(meta, "clock", 601_000)
    assert not fixed()
    client.hset(meta, "quarantine", 0)
    assert fixed()


def test_messages_of_a_live_node_are_its_own(deployed: Any, start: Any, client: Any, site: Site) -> None:
    """--fix does not touch them."""
    start("busy")
    wait_until(lambda: owned(client) == 64, "all shards have owners", 60.0)
    [incarnation] = client.hgetall(keys_of("pool", "members")[0])
    client.hset(f"pool.claims.{incarnation}", "1", "pool.shard.001\n{}")
    assert blamed(diagnose(deployed(), fix=True, timeout=PATIENCE)) == {}
    assert client.hlen(f"pool.claims.{incarnation}") == 1


def test_messages_of_a_static_node_wait_for_its_name(deployed: Any, client: Any) -> None:
    """Whether it is dead or only does not answer, nobody can tell."""
    client.hset("pool.claimants", "static@here", "alive")
    client.hset("pool.claims.static@here", "1", "pool.shard.001\n{}")
    finding = blamed(diagnose(deployed(), fix=True, timeout=PATIENCE))["messages-left"]
    assert not finding.fixed
    assert "-n static@here" in finding.fix
    assert client.hlen("pool.claims.static@here") == 1


def test_static_nodes_foreign_workers_and_shards_without_owner_are_told(deployed: Any, start: Any) -> None:
    """Who consumes what, by the queues."""
    static = start("static", env={"POOL_NODE_SHARDS": "0-61"})
    found = blamed(diagnose(deployed(), timeout=PATIENCE))
    assert set(found) == {"node-static", "shards-unowned"}
    assert static.hostname() in found["node-static"].what
    assert found["shards-unowned"].what == "Nobody owns 2 shards (62, 63)."


def test_a_static_node_among_leased_ones_is_an_error(deployed: Any, start: Any, client: Any) -> None:
    """Two nodes for the same keys."""
    start("leased")
    wait_until(lambda: owned(client) == 64, "all shards have owners", 60.0)
    intruder = start("intruder", env={"POOL_NODE_SHARDS": "5"})
    finding = blamed(diagnose(deployed(), timeout=PATIENCE))["shard-twice"]
    assert intruder.hostname() in finding.what
    assert "shard 5" in finding.what


def test_another_number_of_shards_and_draining_are_told(deployed: Any, start: Any, client: Any) -> None:
    """Against the lease table."""
    node = start("drained")
    wait_until(lambda: owned(client) == 64, "all shards have owners", 60.0)
    app = deployed(shards=8)
    app.control.broadcast("pool_drain", destination=[node.hostname()])
    wait_until(lambda: "draining" in str(client.hgetall(keys_of("pool", "members")[0])), "it drains", 30.0)
    found = blamed(diagnose(app, timeout=PATIENCE), "shards-unowned")
    assert set(found) == {"shards-differ", "node-draining", "all-draining"}
    assert found["shards-differ"].what == "POOL_SHARDS=8 here, but the nodes have 64."


def test_no_node_is_told(deployed: Any, client: Any) -> None:
    """A warning: nothing is broken, and nothing works."""
    assert {f.code: f.level for f in diagnose(deployed(), timeout=PATIENCE) if f.level != "ok"} == {
        "no-nodes": "warning"
    }


# -- this machine


def test_left_over_processes_are_found_and_ended(deployed: Any) -> None:
    """Only found, without --fix."""
    machine = owner().rsplit(".", 2)[0]
    left = subprocess.Popen(["sleep", "1000"], env={**os.environ, MARK: f"{machine}.{os.getpid()}.1.0123456789abcdef"})
    try:
        finding = blamed(diagnose(deployed(), timeout=PATIENCE))["leftover-processes"]
        assert (finding.level, finding.fixed) == ("warning", False)
        assert str(left.pid) in finding.what
        assert not is_gone(left.pid)
        assert blamed(diagnose(deployed(), fix=True, timeout=PATIENCE))["leftover-processes"].fixed
        wait_gone(left.pid)
        assert blamed(diagnose(deployed(), timeout=PATIENCE)) == {}
    finally:
        left.kill()
        left.wait()


def test_an_embedded_valkey_that_nobody_uses_is_found(deployed: Any, tmp_path: Path) -> None:
    """Left by a killed process. One that somebody uses is not blamed."""
    data = tmp_path / "data"
    script = (
        "import sys, time; from pathlib import Path; from pool import embedded\n"
        "embedded.embedded_url(Path(sys.argv[1])); print('up', flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", script, str(data / "valkey")]
    user = subprocess.Popen(command, env=bare_environment(), stdout=subprocess.PIPE, text=True)
    app = deployed(data_dir=data)
    try:
        assert user.stdout is not None
        assert user.stdout.readline() == "up\n"
        assert blamed(diagnose(app, timeout=PATIENCE)) == {}
        user.send_signal(signal.SIGKILL)
        user.wait()
        finding = blamed(diagnose(app, timeout=PATIENCE))["embedded-left"]
        command = finding.fix.partition("python -c ")[2].partition(" (its data")[0]
        subprocess.run(f"{sys.executable} -c {command}", shell=True, env=bare_environment(), check=True, timeout=60)
        assert blamed(diagnose(app, timeout=PATIENCE)) == {}
    finally:
        user.kill()
        user.wait()
        user.stdout.close()
        embedded.stop(data / "valkey")


def test_a_slow_way_to_redis_ends_in_time(deployed: Any, site: Site) -> None:
    """A proxy that takes connections and passes nothing on is a server that cannot be reached."""
    port = int(site.valkey.url.rpartition(":")[2].partition("/")[0])
    with Proxy(("127.0.0.1", port)) as proxy:
        url = site.valkey.url.replace(f":{port}/", f":{proxy.port}/")
        app = deployed(redis_url=url)
        proxy.cut()
        assert {"redis-unreachable", "not-checked"} <= set(blamed(diagnose(app, timeout=2.0)))
