"""The doctor's parts that need no server: findings, the runner, secrets, and that the docs tell all."""

import ast
import json
import re
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from celery import Celery

import pool.doctor
from pool.doctor import Finding, diagnose, worst
from pool.doctor.checks import AT_ONCE, Check, Unreachable, examine
from pool.doctor.finding import error, info, ok, warning
from pool.doctor.secrets import Secrets
from pool.doctor.ssh import FAILURES

SOURCES = sorted(Path(pool.doctor.__file__).parent.glob("*.py"))
DOCS = Path(pool.doctor.__file__).parents[2] / "docs" / "doctor.md"


def made_codes() -> set[str]:
    """Every code that the source gives a finding."""
    found = set(FAILURES)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            maker = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if maker in ("ok", "info", "warning", "error") and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


def test_the_docs_list_exactly_the_codes_that_there_are():
    """A code is an interface."""
    told = {
        code
        for row in re.findall(r"^\| (`[^|]*) \|", DOCS.read_text(), re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", row)
    }
    assert told == made_codes()
    assert len(told) > 50


def test_a_finding_is_json():
    """By dataclasses.asdict."""
    told = json.loads(json.dumps(asdict(warning("a-b", "What.", "Why.", "Fix.", fixed=True))))
    assert told == {"code": "a-b", "level": "warning", "what": "What.", "why": "Why.", "fix": "Fix.", "fixed": True}


@pytest.mark.parametrize(
    ("findings", "level"),
    [
        ([], "ok"),
        ([ok("a", "A")], "ok"),
        ([info("a", "A", "w"), ok("b", "B")], "info"),
        ([error("a", "A", "w", "f"), warning("b", "B", "w", "f")], "error"),
        ([error("a", "A", "w", "f", fixed=True), warning("b", "B", "w", "f")], "warning"),
    ],
)
def test_the_worst_counts_and_what_was_fixed_does_not(findings, level):
    """For exit codes."""
    assert worst(findings) == level


# -- running checks


def test_findings_come_in_the_order_of_the_checks():
    """However long each takes."""
    second_done = threading.Event()

    def first():
        assert second_done.wait(20)
        yield ok("first", "1")

    def second():
        yield ok("second", "2")
        second_done.set()

    assert [found.code for found in examine([Check("a", first), Check("b", second)], 20)] == ["first", "second"]


def test_a_check_that_raises_is_a_finding_and_the_others_go_on():
    """What it had found before counts."""

    def broken():
        yield ok("before", "b")
        raise RuntimeError("boom")

    found = examine([Check("bad", broken), Check("good", lambda: [ok("good", "g")])], 20)
    assert [finding.code for finding in found] == ["before", "check-failed", "good"]
    assert found[1].level == "error"
    assert found[1].what == "bad: the check failed: RuntimeError: boom"


def test_what_cannot_be_asked_is_no_error_of_its_own():
    """The check of what does not answer has said it."""

    def cannot():
        raise Unreachable("It is down")

    [finding] = examine([Check("nodes", cannot)], 20)
    assert (finding.code, finding.level, finding.what) == (
        "not-checked",
        "info",
        "Not checked: nodes. It is down.",
    )


def test_a_check_that_hangs_is_left_behind():
    """With what it had found, and nothing that it finds later."""
    released, ended = threading.Event(), threading.Event()

    def hanging():
        yield ok("early", "e")
        released.wait(60)
        yield ok("late", "l")
        ended.set()

    try:
        found = examine([Check("slow", hanging), Check("quick", lambda: [ok("quick", "q")])], 0.2)
    finally:
        released.set()
    assert ended.wait(20)
    assert [finding.code for finding in found] == ["early", "check-timeout", "quick"]
    assert found[1].what == "slow: not done within 0.2 s."


def test_what_comes_too_late_does_not_count(monkeypatch):
    """Though other checks still run."""
    monkeypatch.setattr("pool.doctor.checks.AT_ONCE", 1)
    released, ended = threading.Event(), threading.Event()

    def hanging():
        released.wait(60)
        yield ok("late", "l")
        ended.set()

    def next_one():
        released.set()
        assert ended.wait(20)
        yield ok("next", "n")

    found = examine([Check("slow", hanging), Check("next", next_one)], 2.0)
    assert [finding.code for finding in found] == ["check-timeout", "next"]


def test_hanging_checks_hold_up_no_others():
    """More of them than run at once."""
    released = threading.Event()

    def hanging():
        released.wait(60)
        return []

    checks = [
        *(Check(f"slow {number}", hanging) for number in range(AT_ONCE)),
        Check("quick", lambda: [ok("quick", "q")]),
    ]
    try:
        found = examine(checks, 0.2)
    finally:
        released.set()
    assert [finding.code for finding in found] == ["check-timeout"] * AT_ONCE + ["quick"]


# -- secrets

CANARY = "c4n4ry%2Fpass"


def test_no_password_of_a_url_is_shown(monkeypatch):
    """Quoted or not, in a list, in a query, in options, in a variable; whoever put it into the text."""
    monkeypatch.setenv("HOST_PASSWORD", "hush-hush")
    conf = {"broker_transport_options": {"sentinel_kwargs": {"password": "sentinel-pw"}}, "redis_password": "redis-pw"}
    urls = [
        f"redis://:{CANARY}@h:1/0",
        ["amqp://u:listed-pw@h;amqp://u:other-pw@h"],
        "redis://h?password=query-pw",
        None,
    ]
    secrets = Secrets.of(conf, urls, ["HOST_PASSWORD", "NOT_SET"])
    hidden = "c4n4ry/pass c4n4ry%2Fpass listed-pw other-pw query-pw sentinel-pw redis-pw hush-hush".split()
    assert secrets.hide(" ".join(hidden)) == " ".join(["**"] * len(hidden))


def test_a_url_in_a_text_loses_its_password_whatever_it_is():
    """Also one that nobody has heard of, and a short one."""
    assert Secrets([]).hide("at redis://me:abc@host:1/0, not http://host:80/a@b") == (
        "at redis://me:**@host:1/0, not http://host:80/a@b"
    )


def test_short_words_are_not_hidden_everywhere():
    """A password like 'a' would leave nothing to read."""
    assert Secrets(["a"]).hide("a cat") == "a cat"


def test_all_texts_of_a_finding_are_cleaned():
    """what, why, fix."""
    cleaned = Secrets(["hush-hush"]).clean(error("c", "hush-hush", "a hush-hush", "b hush-hush"))
    assert cleaned == Finding("c", "error", "**", "a **", "b **")


def test_an_app_without_the_pool_is_told_so():
    """Instead of an AttributeError."""
    [finding] = diagnose(Celery("plain", set_as_current=False))
    assert (finding.code, finding.level) == ("not-installed", "error")
