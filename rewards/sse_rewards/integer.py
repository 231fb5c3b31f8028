r"""The integer path: AIME, AMC and anything whose answer is a short whole number. No sympy.

`\text{204}`, `m+n = 204.`, `\$204`, `204^\circ` and `204 \pmod{1000}` are 204; `204_8`, `204!`,
`204\%`, `2_04`, `> 204`, `\pm 204`, `204 or 205` and `\{204\}` are not.
"""

from __future__ import annotations

import re
from decimal import Decimal

from .surface import plain_latex
from .units import says_more_than_a_unit, without_unit

_INTEGER = re.compile(r"([+-]?)\s*(\d{1,12})(\.0+)?")
_GROUPED = re.compile(r"([+-]?\s*[1-9]\d{0,2})((?:([, ])\d{3})(?:\3\d{3})*)(?![\d,])")
_DIGIT_GROUP = re.compile(r"\{\s*(\d+)\s*\}")
_REFUSED = re.compile(
    r"\\(?:n?leq?q?|n?geq?q?|leqslant|geqslant|lt|gt|neq?|not|approx|approxeq|sim|simeq|cong|equiv|"
    r"pm|mp|in|notin|ni|lor|vee|cup|to|rightarrow|Rightarrow|iff|mid|dots|ldots|cdots|"
    r"propto|subset|subseteq|neg|lnot)(?![A-Za-z])"
    r"|[<>≤≥≠≈±∓≡∈∨∼;]|!=|,|\\\\|(?<![A-Za-z])(?:or|and|not|nor|either|maybe|between)(?![A-Za-z])"
)
_MODULUS = re.compile(
    r"\s*(?:\\pmod\s*\{?\s*1000\s*\}?|\(?\s*(?:\\b?mod|\\text\{\s*\(?mod\s*\}|mod)\s*\{?\s*1000\s*\}?"
    r"\s*\)?|\\text\{\s*\(mod 1000\)\s*\})$"
)
_CONGRUENT = re.compile(r"^[^=<>]*(?:\\equiv|≡)\s*")
_BASE_TEN = re.compile(r"_\s*(?:10|\{\s*(?:10|\\text\{\s*ten\s*\})\s*\}|\\text\{\s*ten\s*\})$")
_DEGREES = re.compile(
    r"\s*(?:\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\circ)|\\degree|°|\{\}\^\\circ)\.?$"
)
_LEADING_TEXT = re.compile(
    r"^(?:\\text\{((?:[^{}]*\b(?:answer|is|are|be|equals)|[^{}]*[:=]))\s*\}|answer)\s*:?\s*"
    r"|^(?:\\text\{\s*\([A-E]\)\s*\}|\([A-E]\))\s*",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"per ?cent|pct")


def read_integer(box: str) -> Decimal | None:
    """The whole number that `box` states and nothing else, or None."""
    text = re.sub(r"\s*(?:[.,;]|\\\\)?\s*$", "", plain_latex(box))
    text = _DIGIT_GROUP.sub(r"\1", text)
    if (found := _INTEGER.fullmatch(text)) is None:
        if (text := _right_side(_without_lead(text))) is None or text.endswith(".."):
            return None
        text = _unwrapped(_without_unit(_unwrapped(text)))
        if grouped := _GROUPED.fullmatch(text):
            text = re.sub(r"[ ,]", "", grouped.group())
        found = _INTEGER.fullmatch(text)
    return None if found is None else Decimal(found.group(1) + found.group(2))


def _without_lead(text: str) -> str:
    r"""Without `\text{The answer is}`, `Answer:` or a choice's letter in front."""
    lead = _LEADING_TEXT.match(text)
    if lead is None or says_more_than_a_unit((lead.group(1) or "").rstrip(":=")):
        return text
    return text[lead.end() :]


def _right_side(text: str) -> str | None:
    """What follows the last `=`; None if anything but equalities and a modulus of 1000 is said."""
    text, moduli = _MODULUS.subn("", text)
    if moduli:
        text = _CONGRUENT.sub("", text, count=1)
    left, equals, right = text.rpartition("=")
    if equals and (
        _REFUSED.search(left) or left.rstrip().endswith(("\\not", "<", ">")) or left.endswith("!")
    ):
        return None
    return right.strip()


def _without_unit(text: str) -> str:
    previous = None
    while text != previous:
        previous = text
        text = _BASE_TEN.sub("", _DEGREES.sub("", text.rstrip(" .")))
        if not _PERCENT.search(text):
            text = without_unit(text)
        text = text.lstrip("$€£¥ ").rstrip("€£¥ ")
    return text


def _unwrapped(text: str) -> str:
    r"""Without redundant brackets around the whole: `{204}`, `(204)`, `\text{204}`, `**204**`."""
    while True:
        if text.startswith("\\text{") and text.endswith("}") and "{" not in text[6:]:
            text = text[6:-1].strip()
        elif text[:1] + text[-1:] in ("{}", "()") and _encloses(text):
            text = text[1:-1].strip()
        elif len(text) > 4 and text.startswith("**") and text.endswith("**"):
            text = text[2:-2].strip()
        else:
            return text


def _encloses(text: str) -> bool:
    """Whether the first bracket closes with the last character."""
    depth = 0
    for character in text[:-1]:
        depth += (character in "({") - (character in ")}")
        if depth == 0:
            return False
    return True
