"""The answer that a text states without a box: for evaluation only, reported apart."""

from __future__ import annotations

import re

_LINES = 5
_LINE_LIMIT = 600
_STATED = re.compile(
    r"(?:final\s+answer|answer)\s*\**\s*(?:is|:|=)\s*:?\s*\**\s*(.{1,400}?)\s*\**\s*\.?\s*$",
    re.IGNORECASE,
)


def stated_answer(text: str) -> str | None:
    """X of "The final answer is X" or "Answer: X" on one of the last lines that are not empty."""
    lines = [line.strip() for line in text[-4000:].splitlines() if line.strip()]
    for line in reversed(lines[-_LINES:]):
        if len(line) <= _LINE_LIMIT and (found := _STATED.search(line)):
            return found.group(1).strip().removesuffix("I hope it is correct").strip(" .")
    return None
