r"""Reads LaTeX expressions and compares their values, in bounded time and without sympy.

Fractions, roots, powers, logarithms, sines, factorials, i and letters. Letters are given fixed
rational values, three times over; two expressions that agree wherever both have a value are the
same. What is outside the grammar, or stays undecided, is left to the symbolic stage.
"""

from __future__ import annotations

import functools
import zlib
from decimal import localcontext
from fractions import Fraction
from typing import NamedTuple

from . import numbers as n
from .expression import FREE_BASE, Expression, Parser, Point, Unreadable
from .numbers import CONTEXT, NO_VALUE, Number

_POINTS = 3


class Algebra(NamedTuple):
    """A readable expression: its value at a point, and the letters it needs."""

    value: Expression
    names: frozenset[str]


def same_value(a: Algebra, b: Algebra) -> bool | None:
    """Whether two expressions agree at every test point where both have a value; None if there
    is no such point, or if they differ by no more than the base of a logarithm."""
    names = a.names | b.names
    agreed = 0
    with localcontext(CONTEXT):
        for point in _points(names):
            try:
                verdict = n.equal(a.value(point), b.value(point))
            except NO_VALUE:
                continue
            if verdict is False:
                return None if FREE_BASE in names else False
            agreed += verdict is True
    return True if agreed >= (2 if names else 1) else None


def ratio_sign(a: Algebra, b: Algebra) -> int | None:
    """The sign of c where a = c b at every test point with one c != 0; 0 without such a c, None
    where that stays undecided."""
    ratios: list[Number] = []
    with localcontext(CONTEXT):
        for point in _points(a.names | b.names):
            try:
                ratios.append(n.divide(a.value(point), b.value(point)))
            except NO_VALUE:
                continue
        if len(ratios) < (2 if a.names | b.names else 1):
            return None
        try:
            if not all(n.equal(ratio, ratios[0]) for ratio in ratios[1:]):
                return 0
            middle = n.ball(ratios[0]).middle
        except NO_VALUE:
            return None
    return (middle > 0) - (middle < 0)


def difference(a: Algebra, b: Algebra) -> Algebra:
    return Algebra(lambda p: n.add(a.value(p), n.negate(b.value(p))), a.names | b.names)


def constant(a: Algebra) -> Fraction | None:
    """The exact rational value of an expression without letters, if it has one."""
    if a.names:
        return None
    with localcontext(CONTEXT):
        try:
            value = a.value({})
        except NO_VALUE:
            return None
    return value if isinstance(value, Fraction) else None


@functools.lru_cache(maxsize=4096)
def read_algebra(latex: str) -> Algebra | None:
    """Parse plain LaTeX (fonts and spacing gone); None outside the grammar."""
    try:
        return Algebra(*Parser(latex).parse())
    except (Unreadable, RecursionError):
        return None


def _points(names: frozenset[str]) -> list[Point]:
    """Positive, larger and negative values, different for each letter, the same in every run."""
    if not names:
        return [{}]
    return [{name: _coordinate(name, index) for name in names} for index in range(_POINTS)]


def _coordinate(name: str, index: int) -> Fraction:
    value = Fraction(zlib.crc32(f"{name}/{index}".encode()) % 9973 + 3000, 3989)
    return -value if index == 2 and name != FREE_BASE else value + 1
