r"""Trailing units: `864 \mbox{ inches}^2` is 864."""

from __future__ import annotations

import re

_TEXT = re.compile(r"\s*\\text\{([^{}]*)\}\s*(?:\^\s*\{?\s*[23]\s*\}?)?$")
_BARE = re.compile(
    r"(?<=[\d)}])\s*(?:cm|mm|km|ft|kg|lbs?|mph|units?|inch(?:es)?|feet|foot|yards?|miles?|"
    r"(?:centi|kilo|milli)?met(?:er|re)s?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|"
    r"degrees?|dollars?|cents?|points?|ways|people|(?:square|cubic|sq\.?) ?[a-z]+)"
    r"\s*(?:\^\s*\{?\s*[23]\s*\}?)?$"
)
_NOT_A_UNIT = re.compile(
    r"(?<![a-z])(?:or|and|not|nor|but|if|maybe|about|approx\w*|roughly|possibly|probably|at|least|"
    r"most|more|less|other|any|mod\w*|base|hundred|thousand|million|billion|trillion|dozen|half|"
    r"factorial|squared|cubed|times|plus|minus|pi|i|[ap]\.?m)(?![a-z])|[^a-z .,'()/-]"
)


def without_unit(text: str) -> str:
    """The quantity alone. Percentages stay, as do words that say more than a unit."""
    found = _TEXT.search(text)
    if found and found.start() > 0 and not _NOT_A_UNIT.search(found.group(1).strip().lower()):
        return text[: found.start()].rstrip()
    return text if found else _BARE.sub("", text)
