"""``examples/web.py``: people who build over the web."""

import json
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

import httpx
import pytest

from tests.support.celery_nodes import CHECKOUT, ProcessContainer, WorkerNode, bare_environment
from tests.support.processes import wait_group_gone
from tests.support.site import RESULT_TIMEOUT, Gate, Site
from tests.support.waiting import wait_until

KEEP = 100_000
"""Bytes of each build's output that Redis keeps here."""


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    return lambda site: [site.start("a", env={"POOL_LIVE_OUTPUT_MB": str(KEEP / 1e6)})]


@pytest.fixture(scope="module")
def running(celery_worker_cluster: object) -> None:
    """There is a node."""


class Web(ProcessContainer):
    """The example on a free port, and a client of it."""

    ready_prompt = "Uvicorn running on"

    def __init__(self, site: Site, **env: str) -> None:
        command = [sys.executable, str(CHECKOUT / "examples" / "web.py"), "0"]
        super().__init__("web", site.folder, command, {**bare_environment(), **site.env, **env}, site.folder)

    def __enter__(self) -> Self:
        self.ready()
        url = self.logs().split(self.ready_prompt)[1].split()[0]
        self.client = httpx.Client(base_url=url, timeout=RESULT_TIMEOUT, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.teardown()

    def build(self, key: str, cmd: str) -> str:
        """Start a build; return the path of it."""
        answer = self.client.post("/builds", json={"user": key, "cmd": cmd})
        assert answer.status_code == 202, answer.text
        assert answer.json()["events"] == f"{answer.headers['location']}/events"
        return answer.headers["location"]

    def look(self, build: str) -> dict[str, Any]:
        return self.client.get(build).raise_for_status().json()

    @contextmanager
    def events(self, build: str, last_id: str | None = None) -> Iterator[Iterator["Event"]]:
        """Follow a build for as long as the block lasts."""
        headers = {} if last_id is None else {"Last-Event-ID": last_id}
        with self.client.stream("GET", f"{build}/events", headers=headers) as answer:
            assert answer.raise_for_status().headers["content-type"].startswith("text/event-stream")
            yield parsed(answer.iter_lines())

    def told(self, build: str, last_id: str | None = None) -> list["Event"]:
        """All events of a build until its end, but how it went on."""
        with self.events(build, last_id) as events:
            return [event for event in events if event.name != "progress"]


class Event:
    """A server-sent event."""

    def __init__(self, fields: dict[str, str]) -> None:
        self.id = fields.get("id")
        self.name = fields["event"]
        self.data = json.loads(fields["data"])

    def __repr__(self) -> str:
        return f"{self.name} {self.data}"


def parsed(lines: Iterator[str]) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            yield Event(fields)
            fields = {}


def text(events: list[Event], stream: str = "stdout") -> str:
    return "".join(event.data["text"] for event in events if event.name == "output" and event.data["stream"] == stream)


def halves(gate: Gate) -> str:
    """A command that writes the halves of a character before and after the gate."""
    return rf"printf 'a\303'; {gate.command.replace('echo built', 'true')}; printf '\244b'"


def until(events: Iterator[Event], wanted: Callable[[list[Event]], Any]) -> list[Event]:
    """Take events until they are what is wanted."""
    found: list[Event] = []
    for event in events:
        found.append(event)
        if wanted(found):
            return found
    raise AssertionError(f"the stream has ended: {found}")


@pytest.fixture(scope="module")
def web(site: Site, running: None) -> Iterator[Web]:
    with Web(site) as web:
        yield web


@pytest.fixture
def followers(site: Site) -> Callable[[], int]:
    """How many connections read a stream."""

    def count() -> int:
        with site.redis() as client:
            return sum(each["cmd"] == "xread" for each in client.client_list())

    assert count() == 0
    return count


def test_a_build_is_followed_while_it_runs_and_to_its_end(web: Web, gate: Gate, key: str) -> None:
    """Its output as it comes, both streams; for how long it runs; how it ended."""
    build = web.build(key, f"echo first; {gate.command}; echo oops >&2")
    with web.events(build) as events:
        told = until(events, lambda told: "first" in text(told))
        assert told[0].name == "progress" or told[0].data["node"].startswith("a@")
        told += until(events, lambda told: (told[-1].data.get("progress") or {}).get("lines") == 1)
        progress = told[-1].data["progress"]
        assert (progress["bytes"], progress["lines"], progress["key"]) == (6, 1, key)
        assert web.look(build)["progress"]["elapsed"] >= progress["elapsed"] > 0
        gate.open()
        told += events
    assert (text(told), text(told, "stderr")) == ("first\nbuilt\n", "oops\n")
    assert told[-1].name == "end"
    assert told[-1].data == {"id": build.split("/")[-1], "state": "SUCCESS", "exit_code": 0}
    done = web.look(build)
    assert (done["state"], done["exit_code"], done["result"]["key"]) == ("SUCCESS", 0, key)


def test_a_character_that_comes_in_two_halves_is_shown_once_it_is_whole(web: Web, gate: Gate, key: str) -> None:
    """Nothing is told of the first half."""
    build = web.build(key, halves(gate))
    with web.events(build) as events:
        told = until(events, text)
        gate.open()
        told += events
    assert [event.data["text"] for event in told if event.name == "output"] == ["a", "äb"]
    assert text(web.told(build)) == "aäb"


def test_a_client_that_comes_back_is_told_what_it_has_missed(web: Web, gate: Gate, key: str) -> None:
    """By the id of the last event that it had, halves of characters included; an id that is none begins anew."""
    build = web.build(key, halves(gate))
    with web.events(build) as events:
        seen = until(events, text)[-1]
    gate.open()
    rest = web.told(build, seen.id)
    assert [event.name for event in rest] == ["output", "end"]
    assert text(rest) == "äb"
    assert [event.name for event in web.told(build, rest[0].id)] == ["end"]
    for wrong in "7", "x", "[1]", '{"a": "b"}', '{"a": NaN}', '{"a": 1e999}':
        assert text(web.told(build, wrong)) == "aäb"


def test_cancel_ends_a_running_build_and_keeps_its_backend(web: Web, gate: Gate, key: str) -> None:
    """The stream says REVOKED, no process is left, the next build is warm; there is nothing left to cancel."""
    build = web.build(key, gate.command)
    with web.events(build) as events:
        group = gate.wait_started()
        answer = web.client.delete(build)
        assert (answer.status_code, answer.json()["cancelled"]) == (202, "running")
        told = list(events)
    wait_group_gone(group)
    assert told[-1].name == "end"
    assert (told[-1].data["state"], told[-1].data["exit_code"]) == ("REVOKED", None)
    assert web.look(build)["error"] == "TaskRevokedError: cancelled on the web"
    again = web.client.delete(build)
    assert (again.status_code, again.json()["error"]) == (409, f"build {build.split('/')[-1]} has ended: REVOKED")
    warm = web.build(key, "true")
    assert web.told(warm)[-1].data["state"] == "SUCCESS"
    assert web.look(warm)["result"]["warm"]


def test_cancel_of_a_waiting_build_ends_it_before_it_has_run(web: Web, gate: Gate, key: str) -> None:
    """Behind as many of its user's as may run at once."""
    ahead = [web.build(key, gate.command) for _ in range(4)]
    gate.wait_started(runs=4)
    build = web.build(key, "echo ran > ran")
    assert web.look(build) == {"id": build.split("/")[-1], "state": "PENDING"}
    assert web.client.delete(build).json()["cancelled"] == "waiting"
    gate.open()
    assert web.told(build)[-1].data["state"] == "REVOKED"
    assert all(web.told(each)[-1].data["state"] == "SUCCESS" for each in ahead)
    assert not (gate.folder / "ran").exists()


def test_a_failing_command_tells_its_exit_code(web: Web, key: str) -> None:
    """And the end of what it said."""
    build = web.build(key, "echo no rule >&2; exit 3")
    told = web.told(build)
    assert text(told, "stderr") == "no rule\n"
    assert (told[-1].name, told[-1].data["state"], told[-1].data["exit_code"]) == ("end", "FAILURE", 3)
    assert told[-1].data["error"].startswith("CommandFailed: ")
    assert "no rule" in web.look(build)["error"]


def test_two_followers_of_a_build_are_told_the_same(web: Web, gate: Gate, key: str) -> None:
    """One from the start, one that comes later."""
    build = web.build(key, f"for i in 1 2 3; do echo line $i; done; {gate.command}")
    with web.events(build) as early:
        first = until(early, lambda told: "line 3" in text(told))
        with web.events(build) as late:
            second = until(late, lambda told: "line 3" in text(told))
            gate.open()
            first, second = [*first, *early], [*second, *late]
    assert text(first) == text(second) == "line 1\nline 2\nline 3\nbuilt\n"
    assert first[-1].data == second[-1].data


def test_output_that_is_kept_no_more_is_told_as_a_gap(web: Web, key: str) -> None:
    """Who comes late to much output learns how much is missing."""
    build = web.build(key, "head -c 3000000 /dev/zero | tr '\\0' x; echo end")
    wait_until(lambda: web.look(build)["state"] == "SUCCESS", "the build is done", RESULT_TIMEOUT)
    told = web.told(build)
    missing = sum(event.data["bytes"] for event in told if event.name == "gap")
    assert missing > 1_000_000
    assert missing + len(text(told)) == 3_000_004
    assert text(told).endswith("xend\n")


def test_a_client_that_goes_away_takes_its_follower_with_it(
    web: Web, gate: Gate, key: str, followers: Callable[[], int]
) -> None:
    """Whether the build is silent or writes more than the client reads."""
    silent = web.build(key, f"echo first; {gate.command}")
    loud = web.build(key, "while [ ! -e go ]; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done")
    try:
        with web.events(silent) as first, web.events(loud) as second:
            until(first, text)
            until(second, text)
            wait_until(lambda: followers() == 2, "both are followed", RESULT_TIMEOUT)
        wait_until(lambda: followers() == 0, lambda: f"{followers()} followers are left", RESULT_TIMEOUT)
        assert {web.look(silent)["state"], web.look(loud)["state"]} <= {"STARTED", "PROGRESS"}
    finally:
        gate.open()
    assert web.told(silent)[-1].data["state"] == web.told(loud)[-1].data["state"] == "SUCCESS"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{", "JSON object"),
        ("[]", "JSON object"),
        ('"user"', "JSON object"),
        ('{"user": "u"}', 'with "user" and "cmd"'),
        ('{"user": "u", "cmd": " "}', "cmd=' ': must be a command"),
        ('{"user": "u", "cmd": ["ls"]}', "cmd=['ls']: must be a command"),
        ('{"user": 7, "cmd": "ls"}', "key 7 is of type int: a key is text"),
        ('{"user": "", "cmd": "ls"}', "key is empty"),
        ('{"user": "a\\nb", "cmd": "ls"}', "holds the control character"),
    ],
)
def test_bad_input_is_refused_with_the_reason(web: Web, body: str, reason: str) -> None:
    """400, and nothing is sent."""
    answer = web.client.post("/builds", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_a_foreign_page_cannot_start_a_build(web: Web) -> None:
    """Neither by a form, which needs no permission, nor under a name of its own for this address."""
    body = '{"user": "u", "cmd": "ls"}'
    assert web.client.post("/builds", content=body, headers={"Content-Type": "text/plain"}).status_code == 400
    assert web.client.post("/builds", json=json.loads(body), headers={"Host": "evil.example"}).status_code == 400


def test_a_user_that_cannot_have_a_folder_fails_with_the_reason(web: Web) -> None:
    """What only the node finds out stands in the build's state."""
    end = web.told(web.build("../up", "ls"))[-1]
    assert (end.data["state"], end.data["exit_code"]) == ("FAILURE", None)
    assert end.data["error"].startswith("InvalidKey: key '../up' cannot stand in root_dir")


def test_a_build_that_nobody_knows_is_not_found(web: Web) -> None:
    """404 wherever it is asked for; nobody waits for it."""
    for method, path in ("GET", ""), ("GET", "/events"), ("DELETE", ""):
        answer = web.client.request(method, f"/builds/0123{path}")
        assert (answer.status_code, answer.json()["error"].split(",")[0]) == (404, "no build '0123'")
    assert web.client.put("/builds/0123").status_code == 405


def test_the_page_is_served(web: Web) -> None:
    """It uses what is promised above."""
    answer = web.client.get("/").raise_for_status()
    assert answer.headers["content-type"].startswith("text/html")
    assert "new EventSource" in answer.text


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "never answers"])
def test_without_redis_everything_is_503(site: Site, silent: bool) -> None:
    """Within some seconds, and with the reason."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        if silent:
            nobody.listen(100)
        url = f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"
        with Web(site, POOL_BROKER_URL=url) as web:
            body = {"user": "u", "cmd": "ls"}
            calls = ("POST", "", body), ("GET", "/0123", None), ("GET", "/0123/events", None), ("DELETE", "/0123", None)
            with ThreadPoolExecutor() as threads:
                asked = [
                    threads.submit(web.client.request, how, f"/builds{what}", json=sent) for how, what, sent in calls
                ]
                answers = [each.result() for each in asked]
            assert [answer.status_code for answer in answers] == [503] * 4
            assert answers[0].json()["error"].startswith("Redis or the broker does not answer: ")
            assert web.client.get("/").status_code == 200
            nobody.close()  # what still waits in a thread is let go


def test_it_ends_while_somebody_follows(site: Site, running: None, gate: Gate, key: str) -> None:
    """Ctrl-C does not wait for builds."""
    with Web(site) as web, web.events(web.build(key, f"echo first; {gate.command}")) as events:
        until(events, text)
        web.kill("SIGINT")
        with pytest.raises(httpx.RemoteProtocolError):
            list(events)
        assert web.wait() in (0, -2)
