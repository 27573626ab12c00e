"""Plain tables for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float) -> str:
    """Return a number with as many digits as tell something: three, or all of those before the point."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def render(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, padded so that it also reads well as it is: first columns left, numbers right."""
    widths = [max(len(cells[at]) for cells in (head, *rows)) for at in range(len(head))]
    is_number = [all(_numeric(row[at]) for row in rows) for at in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, is_number, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width + 1) + ":" if right else "-" * (width + 2) for width, right in zip(widths, is_number, strict=True)
    ]
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *map(line, rows)])


def _numeric(cell: str) -> bool:
    return all(part.strip("%").replace(".", "", 1).isdigit() or part == "-" for part in cell.split(" / "))
