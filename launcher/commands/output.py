"""What commands print with: stdout carries the guest's console, tables and `--json`; all else goes to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def note(text: str) -> None:
    print(f"uklaunch: {text}", file=sys.stderr)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, default=str)
    print()


def print_json_line(value: Any) -> None:
    """For what goes on: one object a line, at once."""
    print(json.dumps(value, default=str), flush=True)


def table_lines(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    table = [tuple(headings), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print("\n".join(table_lines(headings, rows)))
