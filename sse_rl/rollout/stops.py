"""Finds a stop string that a completion's newest token completed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Decode = Callable[[list[int]], str]


def ended_by(tokens: np.ndarray, stops: tuple[str, ...], decode: Decode) -> str | None:
    """First of `stops` in the text that `tokens` end with, None if there is none.

    Called after each token, so a match must touch the newest one: only a tail is decoded, doubled
    until its text is longer than every stop string by the four characters that a cut multi-byte
    character or a trimmed space may spoil on its left (a token may have no text of its own).
    """
    take = needed = max(map(len, stops)) + 4
    while True:
        text = decode(tokens[-take:].tolist())
        if len(text) >= needed or take >= len(tokens):
            return next((stop for stop in stops if stop in text), None)
        take *= 2
