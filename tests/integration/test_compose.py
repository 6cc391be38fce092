import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import pool
from pool import Settings
from tests.support.services import require_service

ROOT = Path(pool.__file__).parents[1]
ONE_SHOT = {"keys"}
NODES = {"node-a", "node-b"}


def config(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``docker-compose config`` on the real file, without the .env and the variables of whoever runs the tests."""
    command = shutil.which("docker-compose")
    require_service("docker-compose", command)
    assert command is not None
    empty = tmp_path / "env"
    empty.touch()
    return subprocess.run(
        [command, "-f", "docker-compose.yml", "--env-file", str(empty), "config"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def services(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The services as docker-compose understands them."""
    result = config(tmp_path, POOL_FLOWER_PASSWORD="given-by-the-test")
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, Any]] = yaml.safe_load(result.stdout)["services"]
    return found


def published(service: dict[str, Any]) -> list[tuple[str, str]]:
    """Address and port of everything published; docker-compose 1 writes text, 2 writes tables."""
    ports = []
    for port in service.get("ports", []):
        if isinstance(port, str):
            address, outside, _ = port.rsplit(":", 2) if port.count(":") > 1 else ("", *port.split(":"))
            ports.append((address, outside))
        else:
            ports.append((port.get("host_ip", ""), str(port["published"])))
    return ports


def test_services_are_the_documented_ones(services: dict[str, dict[str, Any]]) -> None:
    """Redis, the build host and the maker of its keys, two nodes, beat and Flower."""
    assert set(services) == {
        "redis",
        "keys",
        "build-host",
        "node-a",
        "node-b",
        "beat",
        "flower",
        "prometheus",
        "grafana",
    }


def test_only_what_people_look_at_is_published_and_only_on_this_machine(services: dict[str, dict[str, Any]]) -> None:
    """Nothing but Flower and Grafana is reachable from outside, and no service uses the host's network."""
    assert {name: published(s) for name, s in services.items() if "ports" in s} == {
        "flower": [("127.0.0.1", "5555")],
        "grafana": [("127.0.0.1", "3000")],
    }
    assert {s.get("network_mode", "none") for s in services.values()} == {"none"}


def test_every_service_runs_without_root(services: dict[str, dict[str, Any]]) -> None:
    """Each has a user that is not root, no capabilities, and no way to get them."""
    for name, service in services.items():
        assert service.get("user") not in (None, "", "root", "0", 0), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name


def test_every_long_running_service_is_watched_and_restarted(services: dict[str, dict[str, Any]]) -> None:
    """Each has a healthcheck, a restart policy and an end that is not Docker's ten seconds by accident."""
    for name in set(services) - ONE_SHOT:
        assert services[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        assert services[name]["restart"] == "unless-stopped", name
        assert "stop_grace_period" in services[name], name
    assert services["keys"]["restart"] == "no"


def test_no_password_has_a_default(tmp_path: Path) -> None:
    """Without POOL_FLOWER_PASSWORD, or with an empty one, nothing starts, and the message says what to set."""
    for environment in ({}, {"POOL_FLOWER_PASSWORD": ""}):
        result = config(tmp_path, **environment)
        assert result.returncode != 0
        assert "set POOL_FLOWER_PASSWORD in .env" in result.stderr
    assert "POOL_FLOWER_PASSWORD=\n" in (ROOT / ".env.example").read_text()


def test_flower_asks_for_the_given_password(services: dict[str, dict[str, Any]]) -> None:
    """The password reaches Flower by its environment, and no command line has it."""
    assert services["flower"]["environment"]["FLOWER_BASIC_AUTH"] == "admin:given-by-the-test"
    assert not any("given-by-the-test" in str(service.get("command")) for service in services.values())


def test_builds_cannot_reach_the_broker(services: dict[str, dict[str, Any]]) -> None:
    """The build host runs other people's commands: it shares no network with Redis."""
    assert set(services["build-host"]["networks"]) & set(services["redis"]["networks"]) == set()
    assert set(services["node-a"]["networks"]) == {"broker", "builds"}


def test_nodes_share_out_the_shards_by_leases(services: dict[str, dict[str, Any]]) -> None:
    """No node has shards for good; all count as many shards, on one Redis, and no two have the same name."""
    nodes = [services[name] for name in sorted(NODES)]
    assert all(Settings.from_env(node["environment"]).leased for node in nodes)
    for variable in ("POOL_SHARDS", "POOL_REDIS_URL", "POOL_BROKER_URL"):
        assert len({node["environment"][variable] for node in [*nodes, services["beat"]]}) == 1
    assert len({node["command"][node["command"].index("-n") + 1] for node in nodes}) == len(nodes)


@pytest.mark.parametrize("name", sorted(NODES))
def test_healthcheck_of_a_node_asks_that_node(services: dict[str, dict[str, Any]], name: str) -> None:
    """The ping goes to the very node of the container: another one that answers does not count."""
    node = services[name]
    command = node["command"]
    worker = command[command.index("-n") + 1].replace("%h", node["hostname"])
    assert worker == f"{name}@{name}"
    assert node["healthcheck"]["test"][-2:] == ["-d", worker]


@pytest.mark.parametrize("name", sorted(NODES))
def test_node_has_time_for_a_warm_shutdown(services: dict[str, dict[str, Any]], name: str) -> None:
    """More than the running tasks get to finish: what they leave is handed over, not killed."""
    minutes, seconds = re.fullmatch(r"(\d+)m(\d+)s", str(services[name]["stop_grace_period"])).groups()
    assert 60 * int(minutes) + int(seconds) > Settings.from_env(services[name]["environment"]).handoff_timeout


@pytest.mark.parametrize("name", sorted(NODES))
def test_hosts_file_names_what_the_node_has(services: dict[str, dict[str, Any]], name: str) -> None:
    """The hosts file is mounted read-only, and so are the keys it names; the host key is verified."""
    mounts = {}
    for volume in services[name]["volumes"]:
        if isinstance(volume, str):
            source, target, mode = volume.split(":")
            mounts[target] = (source, mode)
        else:
            mounts[volume["target"]] = (volume["source"], "ro" if volume.get("read_only") else "rw")
    source, mode = mounts[services[name]["environment"]["POOL_HOSTS_FILE"]]
    assert mode == "ro"
    default = tomllib.loads(Path(source).read_text())["default"]
    assert default["backend"] == "ssh"
    assert default["host"] in services
    assert default["username"] == services[default["host"]]["user"]
    assert "insecure" not in default
    for path in [*default["client_keys"], default["known_hosts"]]:
        assert mounts[str(Path(path).parent)][1] == "ro"


def test_redis_loses_nothing(services: dict[str, dict[str, Any]]) -> None:
    """AOF is on, nothing is evicted, and the data is in a volume."""
    command = " ".join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert any("redis-data" in str(volume) for volume in services["redis"]["volumes"])


def test_images_are_built_from_this_checkout(services: dict[str, dict[str, Any]]) -> None:
    """Each build names a stage of the one Dockerfile, and what is sent to the engine has no .env."""
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    for service in services.values():
        if "build" in service:
            assert f" AS {service['build']['target']}\n" in dockerfile
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    assert "!.env" not in (ROOT / ".dockerignore").read_text()
