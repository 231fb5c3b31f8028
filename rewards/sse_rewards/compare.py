"""Whether two answers are the same: shape first, then each expression against its counterpart.

Three values: True, False, and None where only symbolic mathematics could tell. The same code
runs in the trainer, where that question stays open, and in a worker, where it is answered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .algebra import difference, ratio_sign, read_algebra, same_value
from .answer import Answer, read_answer, squashed, words_of

Oracle = Callable[[str, str], bool | None]
LIST_LIMIT = 30
_SIMPLE_SIDE = re.compile(
    r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?|\([A-Za-z, ]+\)"
)
_PLAIN_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?|\.\d+")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}


def _undecided(prediction: str, gold: str) -> None:
    return None


def answers_equal(prediction: str, gold: str, oracle: Oracle = _undecided) -> bool | None:
    """Compare two answers in LaTeX; `oracle` settles single expressions that algebra cannot."""
    return equal(read_answer(prediction), read_answer(gold), oracle)


def equal(prediction: Answer, gold: Answer, oracle: Oracle = _undecided) -> bool | None:
    """Compare two parsed answers."""
    if prediction.shape != "words" and squashed(prediction.text) == squashed(gold.text):
        return True
    if gold.shape == "words" or prediction.shape == "words":
        return _words(prediction, gold, oracle)
    if gold.shape == "relation":
        return _against_relation(prediction, gold, oracle)
    if prediction.shape == "relation":
        if set(prediction.mark.split()) != {"="}:
            return False
        return equal(prediction.items[-1], gold, oracle)
    if prediction.shape != gold.shape:
        return False
    if gold.shape == "leaf":
        return _leaves(prediction.text, gold.text, oracle)
    if gold.shape == "base":
        return prediction.mark == gold.mark
    if len(prediction.items) != len(gold.items) or prediction.mark != gold.mark:
        return False
    if gold.shape in ("list", "union"):
        return _in_any_order(prediction.items, gold.items, oracle)
    return _all(equal(p, g, oracle) for p, g in zip(prediction.items, gold.items, strict=True))


def _words(prediction: Answer, gold: Answer, oracle: Oracle) -> bool | None:
    if prediction.shape == "relation" and set(prediction.mark.split()) == {"="}:
        return equal(prediction.items[-1], gold, oracle)
    if words_of(prediction.text) == words_of(gold.text):
        return True
    if "\\text" in prediction.text + gold.text or len(prediction.text) == len(gold.text) == 1:
        return False
    return _leaves(prediction.text, gold.text, oracle) if prediction.shape == "leaf" else False


def _against_relation(prediction: Answer, gold: Answer, oracle: Oracle) -> bool | None:
    operators = gold.mark.split()
    assigns = operators == ["="] and _SIMPLE_SIDE.fullmatch(gold.items[0].text) is not None
    if prediction.shape != "relation":
        return equal(prediction, gold.items[1], oracle) if assigns else False
    theirs = prediction.mark.split()
    same_side = squashed(prediction.items[0].text) == squashed(gold.items[0].text)
    if assigns and same_side and set(theirs) == {"="}:
        return equal(prediction.items[-1], gold.items[1], oracle)
    if len(theirs) != len(operators):
        return False
    verdicts = [
        _all(
            _same_relation(p, q, mark, g, h, operator)
            for (p, q, mark), (g, h, operator) in zip(pairs, _pairs(gold), strict=True)
        )
        for pairs in (_pairs(prediction), _pairs(prediction)[::-1])
    ]
    return True if True in verdicts else None if None in verdicts else False


def _pairs(relation: Answer) -> list[tuple[Answer, Answer, str]]:
    return list(zip(relation.items, relation.items[1:], relation.mark.split(), strict=False))


def _same_relation(
    p: Answer, q: Answer, mark: str, g: Answer, h: Answer, operator: str
) -> bool | None:
    """`p mark q` against `g operator h`: the same up to a factor, negative if it flips."""
    if mark == operator and squashed(p.text + q.text) == squashed(g.text + h.text):
        return True
    if mark not in _FLIPPED or operator not in _FLIPPED:
        return False
    sides = [read_algebra(side.text) for side in (p, q, g, h)]
    if any(side is None for side in sides):
        return None
    a, b, c, d = (side for side in sides if side)
    sign = ratio_sign(difference(a, b), difference(c, d))
    if sign is None:
        return None
    needed = {_FLIPPED[operator]: -1} | {operator: 1}
    if mark in ("=", "\\ne"):
        return sign != 0 and mark == operator
    return sign != 0 and needed.get(mark) == sign


def _leaves(prediction: str, gold: str, oracle: Oracle) -> bool | None:
    if "\\text" in prediction or "\\text" in gold:
        return squashed(prediction).casefold() == squashed(gold).casefold()
    if "%" in prediction or "%" in gold:
        return _percentages(prediction, gold, oracle)
    ours, theirs = read_algebra(prediction), read_algebra(gold)
    if ours and theirs and (verdict := same_value(ours, theirs)) is not None:
        return verdict
    return oracle(prediction, gold)


def _percentages(prediction: str, gold: str, oracle: Oracle) -> bool | None:
    """25% is a quarter; a plain number, and the gold's own sign, may also do without it."""
    p, g = prediction.rstrip(" %"), gold.rstrip(" %")
    if "%" in p or "%" in g:
        return False
    bare = _leaves(p, g, oracle) if "%" in gold or _PLAIN_NUMBER.fullmatch(g) else False
    if bare or ("%" in prediction and "%" in gold):
        return bare
    p = f"\\frac{{{p}}}{{100}}" if "%" in prediction else p
    g = f"\\frac{{{g}}}{{100}}" if "%" in gold else g
    scaled = _leaves(p, g, oracle)
    return True if scaled else None if None in (bare, scaled) else False


def _in_any_order(
    prediction: Sequence[Answer], gold: Sequence[Answer], oracle: Oracle
) -> bool | None:
    if len(gold) > LIST_LIMIT:
        return sorted(squashed(p.text) for p in prediction) == sorted(
            squashed(g.text) for g in gold
        )
    left = list(prediction)
    open_question = False
    for wanted in gold:
        verdicts = [equal(one, wanted, oracle) for one in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            open_question = True
        else:
            return False
    return None if open_question else True


def _all(verdicts: object) -> bool | None:
    answers = list(verdicts)  # pyright: ignore[reportArgumentType]
    return False if False in answers else None if None in answers else True
