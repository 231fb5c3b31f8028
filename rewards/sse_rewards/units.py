r"""Trailing units: `864 \mbox{ inches}^2` is 864."""

from __future__ import annotations

import re

_TEXT = re.compile(r"\s*\\text\{([^{}]*)\}\s*(?:\^\s*\{?\s*[23]\s*\}?)?$")
_BARE = re.compile(
    r"(?<=[\d)}])\s*(?:cm|mm|km|ft|kg|lbs?|mph|units?|inch(?:es)?|feet|foot|yards?|miles?|"
    r"(?:centi|kilo|milli)?met(?:er|re)s?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|"
    r"degrees?|dollars?|cents?|points?|ways|people|(?:square|cubic|sq\.?) ?[a-z]+)"
    r"\s*(?:\^\s*\{?\s*[23]\s*\}?|[²³])?$"
)
_NOT_A_UNIT = re.compile(
    r"(?<![a-z])(?:or|and|not|nor|but|if|maybe|about|approx\w*|roughly|possibly|probably|around|"
    r"at|least|most|more|less|than|other|any|unless|except|never|no|cannot|between|through|to|over|"
    r"mod\w*|base|hundred(?:s|ths?)?|thousand(?:s|ths?)?|tenths?|millions?|billions?|trillions?|"
    r"dozens?|half|halves|thirds?|quarters?|double|twice|factorial|squared|cubed|times|plus|minus|"
    r"wrong|incorrect|false|pi|i|[ap]\.?m)(?![a-z])|[^a-z .,'()/-]"
)


def without_unit(text: str) -> str:
    """The quantity alone. Percentages stay, as do words that say more than a unit."""
    found = _TEXT.search(text)
    if found is None:
        return _BARE.sub("", text)
    if found.start() == 0 or says_more_than_a_unit(found.group(1)):
        return text
    return text[: found.start()].rstrip()


def says_more_than_a_unit(words: str) -> bool:
    """Whether words hedge, negate or scale the number that they stand beside."""
    return _NOT_A_UNIT.search(words.strip().lower()) is not None
