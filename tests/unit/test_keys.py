"""What is a key, and where one may be put."""

import pytest

from pool.errors import InvalidKey, PoolError
from pool.keys import MAX_BYTES, check_key, fill_key


@pytest.mark.parametrize(
    "key",
    [
        "a",
        "user-1",
        "a b",
        "acme:42",
        "Zo\u00eb",
        "\u65e5\u672c",
        "\U0001f642",
        "../..",
        "x" * MAX_BYTES,
        " ",
        "\u00a0",
    ],
)
def test_text_is_a_key(key):
    """Any text, in any script, up to 256 bytes."""
    assert check_key(key) is key


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        (None, "of type NoneType"),
        (5, "a key is text, such as '5'"),
        (True, "of type bool"),
        (b"a", "of type bytes"),
        (["a"], "of type list"),
        ("", "empty"),
        ("x" * 257, "257 bytes long: at most 256"),
        ("\u65e5" * 86, "258 bytes long"),
        ("a\nb", r"control character '\\n'"),
        ("a\x00b", "control character"),
        ("\x7f", "control character"),
        ("\x85", "control character"),
        ("a\u2028b", "control character"),
        ("a\u2029b", "control character"),
        ("\ud800", "surrogate"),
    ],
)
def test_what_is_no_key_is_told_which_rule_it_breaks(key, rule):
    """The message names the rule; the error is a ValueError too."""
    with pytest.raises(InvalidKey, match=rule) as caught:
        check_key(key)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, PoolError)


def test_a_very_long_key_is_not_quoted_in_full():
    """An error message stays readable."""
    with pytest.raises(InvalidKey) as caught:
        check_key("x" * 1_000_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("key", ["a", "_a", "0", "user-1", "a.b", "a@b.c", "a+b=c:d", "a..b", "A" * 256])
def test_a_plain_key_fills_a_template(key):
    """In every place where ``{key}`` stands."""
    assert fill_key("work/{key}/x-{key}", key, "root_dir") == f"work/{key}/x-{key}"


@pytest.mark.parametrize(
    "key",
    [
        "..",
        ".",
        ".ssh",
        "../x",
        "a/b",
        "/etc",
        "a\\b",
        "-rf",
        "~root",
        "a b",
        "a\n",
        "$HOME",
        "a;b",
        "{key}",
        "a\x00",
        "\u00eb",
        "\uff0e\uff0e",
        "%2e",
        "",
        "*",
    ],
)
def test_a_key_that_could_escape_fills_nothing(key):
    """The error names key, field, template and rule."""
    with pytest.raises(InvalidKey) as caught:
        fill_key("work/{key}", key, "root_dir")
    for part in (repr(key), "root_dir", "'work/{key}'", "letters, digits"):
        assert part in str(caught.value)


def test_a_template_without_key_takes_any_key():
    """There is nothing to escape from."""
    assert fill_key("work", "../..", "root_dir") == "work"
