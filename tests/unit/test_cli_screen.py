"""Tables for people, at any width."""

import io

import pytest
from rich.console import Console

from pool.cli.screen import facts, grid

COLUMNS = ("", "node", "state", "shards", "backends", "busy")
ROWS = [["A", "node-a@host", ("no answer", "bold red"), "32", "", ""], ["B", "node-b@host", "ok", "32", "1,000", "12"]]


def shown(part, width, **options):
    file = io.StringIO()
    Console(file=file, width=width, highlight=False, **options).print(part)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_wide_terminal_gets_a_table():
    """With numbers at the right."""
    assert shown(grid(80, COLUMNS, ROWS, right=COLUMNS[3:]), 80) == [
        "   node         state      shards  backends  busy",
        "A  node-a@host  no answer      32",
        "B  node-b@host  ok             32     1,000    12",
    ]


def test_a_table_moves_together_before_it_is_given_up():
    """One blank between columns is enough."""
    assert shown(grid(45, COLUMNS, ROWS), 45)[0] == "  node        state     shards backends busy"


@pytest.mark.parametrize("width", [20, 30, 40])
def test_a_narrow_terminal_gets_a_block_for_each_row(width):
    """No value is cut, and no pair torn apart where it fits."""
    lines = shown(grid(width, COLUMNS, ROWS), width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    for told in ("A  node-a@host", "state no answer", "shards 32", "backends 1,000", "busy 12"):
        assert told in text


def test_values_are_text_and_nothing_else():
    """Neither markup nor escape sequences from elsewhere."""
    lines = shown(facts([("key", "[red]x[/red]\x1b[2J"), ("runs", ["a", "b"])]), 60)
    assert lines == ["key   [red]x[/red]^[[2J", "runs  a", "      b"]
