"""How values are put for people."""

import pytest

from pool.cli.words import count, duration, harmless, many, percent, plain


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "^[[31mred^[[0m"),
        ("bell\x07 null\x00 delete\x7f", "bell^G null^@ delete^?"),
        ("\x9b31m", "<9b>31m"),
        ("a\tb\nc\rd", "a\tb\nc\rd"),
        ("turned \u202egnihton", "turned <U+202E>gnihton"),
        ("Grüße, 日本, 🙂", "Grüße, 日本, 🙂"),
    ],
)
def test_nothing_in_an_output_acts_on_the_terminal(given, shown):
    """Control characters and turns of direction are made visible; letters stay."""
    assert harmless(given) == shown


def test_a_value_from_elsewhere_stays_on_its_line():
    """So that it cannot pretend to be another line of the answer."""
    assert plain("a\nb\r\nc\rd\te") == "a b c^Md e"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (600, "10 min"), (7200, "2.0 h"), (864000, "10 d"), (None, "")],
)
def test_durations_are_short(seconds, shown):
    """Two digits say enough."""
    assert duration(seconds) == shown


def test_what_is_not_known_is_empty():
    """An older node may leave a field out."""
    assert count(None) == percent(None) == ""
    assert (count(12345), percent(0.966), many(1, "node"), many(2000, "node")) == (
        "12,345",
        "97 %",
        "1 node",
        "2,000 nodes",
    )
