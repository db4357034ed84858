"""Tables and labelled lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The ``rows`` in columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def line(label: str, text: str) -> str:
    """One labelled line."""
    return f"{label:<10} {text}"


def several(n: int, noun: str, others: str | None = None) -> str:
    """``n`` with its noun in the right number; ``others`` is the plural of a noun that takes no s."""
    return f"{n:,} {noun if n == 1 else others or noun + 's'}"


def counts(applied: Iterable[tuple[str, int]]) -> str:
    """How often each pass was applied; those that were not are left out."""
    return ", ".join(f"{name} {n}" for name, n in applied if n)
