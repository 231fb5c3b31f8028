r"""The last `\boxed{...}` of a text, found in linear time.

Only the last box counts: an earlier right one does not save a last one that is empty or unclosed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

COMMANDS = ("\\boxed", "\\fbox", "\\framebox")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_OPTIONS = re.compile(r"(?:\s{0,9}\[[^\[\]{}]{0,40}\]){0,2}")
_BARE = re.compile(r"[-+\u2212]?(?:\d[\d,]{0,40}(?:\.\d{1,40})?)(?![\w\\^({!%])")
_BARE_START = re.compile(r"[-+\u2212]?\d")


class Box(NamedTuple):
    content: str | None
    """None where the box is never closed."""
    depth: int = 0
    """Deepest nesting of braces inside."""


def last_box(text: str) -> Box | None:
    r"""The last box of `text`, the innermost one if nested; None without any.

    Takes `\boxed{..}`, `\boxed {..}`, `\fbox{..}`, `\framebox[w][p]{..}` and `\boxed 7`; escaped
    braces do not count. A command followed by none of these is a mention, not a box.
    """
    last = {command: text.rfind(command) for command in COMMANDS}
    while True:
        command = max(COMMANDS, key=last.__getitem__)
        start = last[command]
        if start < 0:
            return None
        box = _box_after(text, start + len(command), brackets=command == "\\framebox")
        if box is not None:
            return box
        last[command] = text.rfind(command, 0, start)


def _box_after(text: str, position: int, *, brackets: bool) -> Box | None:
    if position < len(text) and text[position].isalpha():
        return None
    if brackets and (options := _OPTIONS.match(text, position)):
        position = options.end()
    while position < len(text) and (text[position].isspace() or text[position] in "\u200b\ufeff"):
        position += 1
    if position == len(text):
        return Box(None)
    if text[position] == "{":
        return _braced(text, position)
    if _BARE_START.match(text, position):
        number = _BARE.match(text, position)
        return Box(number.group().rstrip(",") if number else text[position:].split(None, 1)[0])
    return None


def _braced(text: str, start: int) -> Box:
    depth = deepest = 0
    for token in _BRACE.finditer(text, start):
        if token.group() == "{":
            depth += 1
            deepest = max(deepest, depth)
        elif token.group() == "}":
            depth -= 1
            if depth == 0:
                return Box(text[start + 1 : token.start()], deepest - 1)
    return Box(None)
