"""Tables as Markdown writes them."""

from __future__ import annotations

from collections.abc import Iterable


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """One row a line, the head first."""
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def p_value(p: float) -> str:
    """As far as 20,000 random flips can tell."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
