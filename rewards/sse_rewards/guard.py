"""What no symbolic engine should be asked: towers, huge powers and factorials, series, limits."""

from __future__ import annotations

import re

from .algebra import constant, read_algebra

EXPONENT_LIMIT = 10_000
POLYNOMIAL_LIMIT = 50
FACTORIAL_LIMIT = 2_000
BINOMIAL_LIMIT = 10_000
DEPTH_LIMIT = 50
BAR_LIMIT = 20
_SERIES = re.compile(r"\\(?:sum|prod|coprod|o?i{0,3}nt|lim|limsup|liminf)(?![A-Za-z])|[∑∏∫]")
_NUMBER = re.compile(r"\d+(?:\s*\^\s*\{?\d+)?")
_BINOMIAL = re.compile(r"\\[dt]?binom|\\choose(?![A-Za-z])|\\brack(?![A-Za-z])")


def danger(prediction: str, gold: str) -> str:
    """Why a prediction is refused before any parsing by sympy; empty if it is not."""
    if _SERIES.search(prediction) and not _SERIES.search(gold):
        return "a series, limit or integral that the gold does not have"
    if _depth(prediction) > DEPTH_LIMIT:
        return f"brackets deeper than {DEPTH_LIMIT}"
    if "!" in prediction and (reason := _factorials(prediction)):
        return reason
    if "^" in prediction and (reason := _powers(prediction)):
        return reason
    if _BINOMIAL.search(prediction) and _large(prediction, BINOMIAL_LIMIT):
        return f"a binomial above {BINOMIAL_LIMIT}"
    if prediction.count("|") > BAR_LIMIT:
        return f"more than {BAR_LIMIT} bars"
    return ""


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _large(text: str, limit: int) -> bool:
    """Whether a number of the text, powers of numbers included, is above the limit."""
    for found in _NUMBER.finditer(text):
        base, _, exponent = re.sub(r"[\s{]", "", found.group()).partition("^")
        size = len(base) * int(exponent[:6]) if exponent else len(base)
        if size > 12 or int(base) ** int(exponent or 1) > limit:
            return True
    return False


def _factorials(text: str) -> str:
    for sign in re.finditer(r"!", text):
        before = text[: sign.start()].rstrip()
        number = re.search(r"\d+$", before)
        if number and int(number.group()[-12:]) > FACTORIAL_LIMIT:
            return f"a factorial above {FACTORIAL_LIMIT}"
        if before.endswith("!") or (before[-1:] in ")}]" and re.search(r"\d{3}|[\^!*]", before)):
            return "a factorial of a large or unclear number"
    return ""


def _powers(text: str) -> str:
    for sign in re.finditer(r"\^", text):
        exponent, end = _argument(text, sign.end())
        if text[end:].lstrip().startswith("^"):
            return "a tower of powers"
        if "!" in exponent:
            return "a factorial in an exponent"
        if "^" in exponent and (not re.search(r"[A-Za-z]", exponent) or _levels(exponent) > 1):
            return "a tower of powers"
        algebra = read_algebra(exponent)
        value = constant(algebra) if algebra else None
        if value is not None and abs(value) > EXPONENT_LIMIT:
            return f"an exponent above {EXPONENT_LIMIT}"
        if any(len(number) > 5 for number in re.findall(r"\d+", exponent)):
            return f"an exponent above {EXPONENT_LIMIT}"
        base = text[: sign.start()].rstrip()
        letters = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", base))
        if letters and base[-1] in ")]}" and value is not None and abs(value) > POLYNOMIAL_LIMIT:
            return f"a power of a polynomial above {POLYNOMIAL_LIMIT}"
    return ""


def _levels(exponent: str) -> int:
    levels = 0
    while "^" in exponent:
        exponent, _ = _argument(exponent, exponent.index("^") + 1)
        levels += 1
    return levels


def _argument(text: str, start: int) -> tuple[str, int]:
    """The exponent that begins at `start`, and where it ends."""
    while start < len(text) and text[start].isspace():
        start += 1
    if not text.startswith("{", start):
        found = re.compile(r"-?(?:\d+|\\[A-Za-z]+|.)?").match(text, start)
        end = found.end() if found else start
        return text[start:end], end
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start + 1 : position], position + 1
    return text[start + 1 :], len(text)
