"""What a producer sees when a build, its key or its host is at fault."""

from collections.abc import Callable

import pytest
from celery import states

from pool import BackendUnavailable, CommandFailed, CommandTimeout, FileMissing, InvalidKey, PathEscapeError
from pool.loopback_sshd import LoopbackSshd
from tests.support.celery_nodes import WorkerNode
from tests.support.processes import wait_group_gone
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def absent(site: Site) -> LoopbackSshd:
    """A build host that was there once, so that its port and keys are known, and is down now."""
    with LoopbackSshd(site.folder / "absent", home=site.folder / "absent-home") as once:
        info = once.info
    server = LoopbackSshd(site.folder / "absent", home=site.folder / "absent-home", port=info.port)
    server.info = info
    yield server
    server.stop()


@pytest.fixture(scope="module")
def hosts(sshd: LoopbackSshd, absent: LoopbackSshd, site: Site) -> str:
    """One rule for each way to fail; every other key works over SSH."""
    stranger = site.folder / "stranger"
    with LoopbackSshd(stranger, home=site.folder / "stranger-home") as other:
        wrong_key = other.info.client_key

    def ssh(server: LoopbackSshd, client_key: object) -> str:
        return f"""
            backend = "ssh"
            host = "127.0.0.1"
            port = {server.info.port}
            username = "builder"
            root_dir = "builds/{{key}}"
            client_keys = "{client_key}"
            known_hosts = "{server.info.known_hosts}"
        """

    return "\n".join(
        [
            "[default]",
            ssh(sshd, sshd.info.client_key),
            '[[match]]\nkey = "absent*"',
            ssh(absent, absent.info.client_key),
            '[[match]]\nkey = "intruder*"',
            ssh(sshd, wrong_key),
        ]
    )


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    return lambda site: [site.start()]


def test_a_failing_command_is_a_command_failed_in_the_producer(producer: Producer, key: str) -> None:
    """State FAILURE; the exception is the pool's own class again, with exit code and the end of stderr."""
    result = producer.build(key, "echo building; echo 'no rule to make target' >&2; exit 7")
    with pytest.raises(CommandFailed) as caught:
        result.get(timeout=RESULT_TIMEOUT)
    assert type(caught.value) is CommandFailed
    assert caught.value.exit_code == 7
    assert "no rule to make target" in caught.value.tail
    assert "7" in str(caught.value)
    assert "no rule to make target" in str(caught.value)
    assert result.state == states.FAILURE
    assert producer.built(key)["warm"], "a failing command costs its user the connection"


def test_an_unchecked_command_tells_its_exit_code(producer: Producer, key: str) -> None:
    """``check=False``: a result, not a failure."""
    assert producer.built(key, "echo oh; exit 3", check=False)["exit_code"] == 3


def test_a_command_that_takes_too_long_is_killed_with_all_it_started(
    producer: Producer, sshd: LoopbackSshd, key: str
) -> None:
    """CommandTimeout with its limit; the process group on the host is gone, the connection stays."""
    gate = Gate(sshd.info.home / "builds" / key)
    result = producer.build(key, f"{gate.command} & wait", timeout=3)
    group = gate.wait_started()
    with pytest.raises(CommandTimeout) as caught:
        result.get(timeout=RESULT_TIMEOUT)
    assert caught.value.timeout == 3
    wait_group_gone(group)
    assert producer.built(key)["warm"]


@pytest.mark.parametrize("cwd", ["..", "a/../../b", "link"])
def test_a_folder_outside_of_the_root_is_a_path_escape(cwd: str, producer: Producer, key: str) -> None:
    """By ``..`` and by a symlink; the command never runs."""
    producer.built(key, "ln -sfn / link; mkdir -p a")
    with pytest.raises(PathEscapeError):
        producer.built(key, "touch ran", cwd=cwd)


def test_a_missing_folder_is_a_file_missing(producer: Producer, key: str) -> None:
    """Also a FileNotFoundError, as ``open`` would raise it."""
    with pytest.raises(FileMissing) as caught:
        producer.built(key, "true", cwd="nowhere")
    assert isinstance(caught.value, FileNotFoundError)


def test_a_project_is_a_folder_of_its_own(producer: Producer, sshd: LoopbackSshd, key: str) -> None:
    """``project=`` runs below projects/NAME, and cannot name another place."""
    built = producer.built(key, "pwd", project="web")
    assert built["output"].strip() == str(sshd.info.home / "builds" / key / "projects" / "web")
    with pytest.raises(PathEscapeError):
        producer.built(key, "pwd", project="../../../other")


@pytest.mark.parametrize("bad", ["../x", "a/b", "..", ".hidden", "-rf"])
def test_a_key_that_cannot_be_a_folder_is_refused_by_the_node(bad: str, producer: Producer, sshd: LoopbackSshd) -> None:
    """``{key}`` in root_dir: InvalidKey comes back, and nothing is connected or made."""
    logins = sshd.info.count_logins()
    with pytest.raises(InvalidKey, match="root_dir"):
        producer.built(bad)
    assert sshd.info.count_logins() == logins


def test_a_wrong_login_fails_at_once(producer: Producer) -> None:
    """Only a person can help: BackendUnavailable with reason ``login``, no retry_after and no retry."""
    result = producer.build("intruder-1", "true")
    with pytest.raises(BackendUnavailable) as caught:
        result.get(timeout=RESULT_TIMEOUT)
    assert (caught.value.reason, caught.value.retry_after) == ("login", None)
    assert result._get_task_meta()["status"] == states.FAILURE
    node = producer.worker
    assert f"[{result.id}] retry" not in node.logs()


def test_a_host_that_is_down_is_retried_until_it_is_back(producer: Producer, absent: LoopbackSshd) -> None:
    """BackendUnavailable carries retry_after, the task is in RETRY meanwhile, and succeeds once the host answers."""
    result = producer.build("absent-1", "echo at last")
    wait_until(lambda: result.state == states.RETRY, "the task is being retried", RESULT_TIMEOUT)
    assert isinstance(result.info, BackendUnavailable)
    assert result.info.reason == "refused"
    assert result.info.retry_after > 0
    absent.start()
    assert result.get(timeout=RESULT_TIMEOUT)["output"] == "at last\n"
    assert absent.info.count_logins() == 1


def test_the_log_of_a_node_holds_no_commands(producer: Producer, key: str) -> None:
    """A command may hold a token of its user: it is in no log line, and neither is the script around it."""
    producer.built(key, "TOKEN=abc123xyz true")
    log = producer.worker.logs()
    assert "backend created: key=" in log
    assert "abc123xyz" not in log
    assert "/bin/sh" not in log


def test_secrets_of_the_node_are_not_seen_by_builds(producer: Producer, key: str) -> None:
    """The environment of a build holds none of the node's variables."""
    output = producer.built(key, "env")["output"]
    assert "POOL_" not in output
    assert "PYTHONPATH" not in output
