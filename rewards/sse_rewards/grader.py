"""From a completion to a result, or to the one question that only mathematics can answer.

Pure functions of text: no process, no clock, no sympy. `pool` puts the questions to its workers.
"""

from __future__ import annotations

import functools
import re
from decimal import Decimal
from typing import NamedTuple

from .answer import Answer, read_answer, squashed
from .box import last_box
from .compare import equal
from .guard import danger
from .integer import read_integer
from .lenient import stated_answer
from .result import Kind, Result, Status
from .surface import plain_characters
from .zone import answer_zone

BOX_LIMIT = 1000
INTEGER_BOX_LIMIT = 400
DEPTH_LIMIT = 50
DIGIT_LIMIT = 400
_PLAIN_INTEGER = re.compile(r"\$?\s*([+-]?\d{1,12})(\.0+)?\s*\$?")
_AUTO_INTEGER = re.compile(r"\d{1,3}")
_LONG_NUMBER = re.compile(r"\d{401}")
_ENVIRONMENT = re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL)
"""A matrix may be written over several lines."""


class Gold(NamedTuple):
    """A gold answer, read once."""

    text: str
    integer: Decimal | None
    """Its value, where it is a whole number."""
    integers_only: bool
    """AIME: nothing but a whole number can be right."""
    answer: Answer | None
    problem: str = ""
    """Why nothing can be graded against it."""


class Question(NamedTuple):
    """Two answers whose equality the cheap stages left open."""

    prediction: str
    gold: str

    def result(self, status: Status, reason: str, stage: str) -> Result:
        return _result(status, reason, stage, self.prediction)


def judge(
    completion: str, answer: str, kind: Kind = "auto", *, lenient: bool = False
) -> Result | Question:
    """Decide as far as text, integers and exact arithmetic go; never raises."""
    try:
        return _judge(completion, answer, kind, lenient)
    except Exception as failure:  # untrusted text: failing means 0
        return _result("error", f"{type(failure).__name__}: {failure}"[:200], "error", None)


def _judge(completion: str, answer: str, kind: Kind, lenient: bool) -> Result | Question:
    if not isinstance(answer, str | int | float):
        return Result(None, False, None, "bad_gold", f"no text: {answer!r}"[:200], "gold")
    gold = read_gold(str(answer), kind)
    if gold.problem:
        return Result(None, False, None, "bad_gold", gold.problem, "gold")
    zone = answer_zone(completion)
    if zone.unfinished:
        return _result("unfinished_thinking", "<think> is never closed", "zone", None)
    box = last_box(zone.text)
    if box is None:
        content = stated_answer(zone.text) if lenient else None
        if content is None:
            return _result("no_box", "no box in the answer", "box", None)
    elif box.content is None:
        return _result("truncated", "the last box is never closed", "box", None)
    else:
        content = box.content
        if box.depth > DEPTH_LIMIT:
            return _refused(f"braces deeper than {DEPTH_LIMIT}", content)
    return _compare(content, gold)


def _compare(content: str, gold: Gold) -> Result | Question:
    limit = INTEGER_BOX_LIMIT if gold.integers_only else BOX_LIMIT
    if len(content) > limit:
        return _refused(f"a box of {len(content)} characters, above {limit}", content)
    text = plain_characters(content)
    if text is None:
        return _refused("a control character in the box", content)
    text = text.strip()
    if not text:
        return _result("empty_box", "the last box is empty", "box", text)
    if _LONG_NUMBER.search(text):
        return _refused(f"a number of more than {DIGIT_LIMIT} digits", text)
    if gold.integer is not None:
        value = read_integer(text)
        if value == gold.integer:
            return _result("correct", "the same integer", "integer", text)
        if gold.integers_only:
            return _result("wrong", "another integer" if value else "no integer", "integer", text)
    if text == gold.text:
        return _result("correct", "the same text", "text", text)
    assert gold.answer is not None
    prediction = read_answer(text)
    same = squashed(prediction.text) == squashed(gold.answer.text)
    if same and prediction.shape == gold.answer.shape:
        return _result("correct", "the same text", "text", text)
    if reason := danger(prediction.text, gold.answer.text):
        return _result("unparseable", reason, "guard", text)
    verdict = equal(prediction, gold.answer)
    if verdict is None:
        return Question(text, gold.text)
    return _result("correct" if verdict else "wrong", "compared exactly", "exact", text)


@functools.lru_cache(maxsize=16_384)
def read_gold(answer: str, kind: str) -> Gold:
    """Read a gold answer; `problem` says what is wrong with it, if anything is."""
    box = last_box(answer)
    text = plain_characters(answer if box is None or box.content is None else box.content)
    path = _path(kind)
    if path is None:
        return _bad(f"unknown kind {kind!r}; one of auto, aime, math")
    if text is None:
        return _bad("a control character in the gold (a form feed is a broken \\frac)")
    text = text.strip()
    if not text:
        return _bad("an empty gold")
    if "####" in text:
        return _bad(
            "a worked solution: take out the answer that follows #### (in a recipe: "
            'answer_match: "#### (.+)")'
        )
    if len(text) > BOX_LIMIT:
        return _bad(f"a gold of {len(text)} characters, above {BOX_LIMIT}")
    if "\n" in _ENVIRONMENT.sub("", text):
        return _bad("a gold of several lines: take the answer out of the text around it")
    plain = _PLAIN_INTEGER.fullmatch(text)
    if path == "aime" or (path == "auto" and _AUTO_INTEGER.fullmatch(text)):
        if plain is None:
            return _bad(f"not a whole number: {text!r}")
        return Gold(text, Decimal(plain.group(1)), True, None)
    if text.count("{") != text.count("}"):
        return _bad(f"unbalanced braces: {text!r}")
    number = plain.group(1) if plain else None
    return Gold(text, None if number is None else Decimal(number), False, read_answer(text))


def _path(kind: str) -> Kind | None:
    if kind.startswith(("aime", "amc")):
        return "aime"
    if kind.startswith(("math", "gsm8k")):
        return "math"
    return "auto" if kind == "auto" else None


def _bad(problem: str) -> Gold:
    return Gold("", None, False, None, problem)


def _refused(reason: str, content: str) -> Result:
    return _result("unparseable", reason, "limits", content[:BOX_LIMIT])


def _result(status: Status, reason: str, stage: str, extracted: str | None) -> Result:
    correct = status == "correct"
    return Result(1.0 if correct else 0.0, correct, extracted, status, reason, stage)
