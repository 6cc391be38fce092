"""Secrets of an agent: named in a file, read when it starts, shown nowhere."""

import pytest

from pool.backends.secrets import check_secrets, read_secret, read_secrets
from pool.errors import ConfigError


def test_secrets_come_from_variables_and_files(tmp_path, monkeypatch):
    """A newline at the end of a file is not part of the secret; other space is."""
    monkeypatch.setenv("TOKEN_A", " a ")
    (tmp_path / "token").write_text(" b \n")
    given = {"A": {"env": "TOKEN_A"}, "B": {"file": str(tmp_path / "token")}}
    assert read_secrets(check_secrets(given)) == {"A": " a ", "B": " b "}


def test_a_file_may_be_in_the_home_folder(tmp_path, monkeypatch):
    """As the hosts file's other paths."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("x")
    assert read_secret("A", {"file": "~/token"}) == "x"


def test_an_empty_variable_is_a_secret(monkeypatch):
    """It is there."""
    monkeypatch.setenv("EMPTY", "")
    assert read_secret("A", {"env": "EMPTY"}) == ""


@pytest.mark.parametrize(
    "given",
    [
        None,
        "secret",
        ["A"],
        {"A": "the-secret-itself"},
        {"A": {}},
        {"A": {"env": "A", "file": "/a"}},
        {"A": {"value": "the-secret-itself"}},
        {"A": {"env": ""}},
        {"A": {"file": 3}},
    ],
)
def test_what_names_no_secret_is_refused_and_not_shown(given):
    """Someone may have written the secret itself there."""
    with pytest.raises(ConfigError, match="secrets: ") as caught:
        check_secrets(given)
    assert "the-secret-itself" not in str(caught.value)


def test_a_missing_secret_says_where_it_should_have_been(tmp_path, monkeypatch):
    """By the name in the config and the place; for a person at the worker."""
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(ConfigError, match=r"secrets: A: the worker has no environment variable 'NO_SUCH'"):
        read_secret("A", {"env": "NO_SUCH"})
    with pytest.raises(ConfigError, match=rf"secrets: A: file '{tmp_path}/no': No such file"):
        read_secret("A", {"file": f"{tmp_path}/no"})
    with pytest.raises(ConfigError, match=r"Is a directory"):
        read_secret("A", {"file": str(tmp_path)})


def test_a_file_that_is_no_text_is_refused_and_not_shown(tmp_path):
    """Not even in the chain of causes."""
    (tmp_path / "token").write_bytes(b"\xff\xfesecret")
    with pytest.raises(ConfigError, match="not UTF-8") as caught:
        read_secret("A", {"file": str(tmp_path / "token")})
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_checked_table_is_a_copy():
    """What the caller changes later changes nothing."""
    given = {"A": {"env": "X"}}
    checked = check_secrets(given)
    given["A"]["env"] = "Y"
    assert checked == {"A": {"env": "X"}}
