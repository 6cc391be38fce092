"""Where a command's answer goes: tables for people, JSON for programs; colours and width as the terminal has them."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pool.cli.words import plain

FILE_WIDTH = 160
"""Columns where the answer goes into a file or a pipe."""

Cell = str | tuple[str, str]
"""Text, or text and its style."""


class Screen:
    """*as_json*: one JSON value on stdout is the whole answer."""

    def __init__(self, *, as_json: bool = False, no_color: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._no_color = no_color
        self.out = self._console(stderr=False)
        self.err = self._console(stderr=True)

    def _console(self, *, stderr: bool) -> Console:
        stream = sys.stderr if stderr else sys.stdout
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a key may have letters that the terminal has not
        size: dict[str, int] = {}
        if not stream.isatty() and "COLUMNS" not in os.environ:
            size = {"width": FILE_WIDTH}
        elif os.environ.get("TERM") in ("dumb", "unknown"):  # rich would not ask such a one
            columns, lines = shutil.get_terminal_size()
            size = {"width": columns, "height": lines}
        no_color = self._no_color or None
        return Console(stderr=stderr, no_color=no_color, highlight=False, markup=False, emoji=False, **size)  # type: ignore[arg-type]

    def show(self, *parts: RenderableType) -> None:
        """Print for people; nothing with JSON."""
        if self.as_json:
            return
        if self.out.is_terminal:
            self.out.print(*parts, sep="\n")
            return
        with self.out.capture() as captured:
            self.out.print(*parts, sep="\n")
        self.out.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def tell(self, value: Any) -> None:
        """Print for programs; nothing without JSON."""
        if self.as_json:
            sys.stdout.write(json.dumps(value) + "\n")
            sys.stdout.flush()

    def note(self, text: str, style: str = "") -> None:
        """Say something besides the answer, on stderr."""
        if not self.quiet:
            self.err.print(Text(plain(text), style))

    def fail(self, text: str) -> None:
        """Say why there is no answer: on stderr, and as ``{"error": ...}`` with JSON."""
        self.tell({"error": text})
        self.err.print(Text.assemble(("Error: ", "bold red"), plain(text)))


def grid(
    width: int, columns: Sequence[str], rows: Iterable[Sequence[Cell]], right: Sequence[str] = ()
) -> RenderableType:
    """Lay rows out as a table, or one below the other where *width* is too little for that.

    *columns*: their titles; an empty cell is left out where rows stand below each other. *right*: titles of columns
    of numbers.
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [max([cell_len(title), *(row[index].cell_len for row in cells)]) for index, title in enumerate(columns)]
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= width else 1
    if sum(widths) + gap * (len(widths) - 1) > width:
        return Group(*(line for row in cells for line in _card(width, columns, row)))
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="bold", pad_edge=False)
    for title in columns:
        table.add_column(title, justify="right" if title in right else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    return table


def facts(pairs: Iterable[tuple[str, Cell | Sequence[Cell]]]) -> RenderableType:
    """Lay names and values out, one pair a line; a value of several lines as a list of them."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        lines = value if isinstance(value, list) else [value]
        for index, line in enumerate(lines):
            table.add_row("" if index else name, _text(line))
    return table


def _card(width: int, columns: Sequence[str], row: Sequence[Text]) -> Iterator[Text]:
    """One row as lines of names and values; a pair stays together where it can."""
    heads = 1 if columns[0] else 2  # a mark without a title goes with what it marks
    head = Text("  ").join(row[:heads])
    head.stylize("bold")
    yield head
    line = Text()
    for title, cell in zip(columns[heads:], row[heads:], strict=True):
        if not cell.plain:
            continue
        pair = Text.assemble("  ", title, " ", cell)
        if line and line.cell_len + pair.cell_len > width:
            yield line
            line = Text()
        line.append_text(pair)
    if line:
        yield line


def _text(cell: Cell) -> Text:
    value, style = cell if isinstance(cell, tuple) else (cell, "")
    return Text(plain(value), style)
