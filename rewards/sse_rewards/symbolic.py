"""The last stage: are two LaTeX expressions the same mathematics? Runs in worker processes only.

math-verify's grammar reads the text (never `sympify`, `parse_expr` or `eval`); equality is decided
here, at points and relatively, because math-verify's own comparison is absolute to 1e-15 and
takes 0.333333 for 1/3.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
_LATEX_ONLY = [LatexExtractionConfig(boxed_match_priority=0)]
_DECIMAL = re.compile(r"(?<![\\w.])(\d*)\.(\d+)(?![\d.])")
_MISREAD = re.compile(r"\d\s+\d|[\d)}\]]\s*_|'|\\dots|\\ldots|\\cdots|\\text|\\neg|\\not|:|;|\?")
"""What the grammar reads as something else: `2 3` as 5, `1_2` as 1, `x'` as x."""
_NAME = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
_DIGITS = 60
_CLOSE = sympy.Float(10) ** -40
_POINTS = ((17, 23, 5, 41), (29, 19, 7, 43), (-31, 37, -3, 47))


def same_mathematics(prediction: str, gold: str) -> bool | None:
    """Whether two expressions agree wherever both are defined; None if either cannot be read, or
    is no expression. Other letters are another answer; the grammar ignores their case."""
    if _MISREAD.search(prediction) or _MISREAD.search(gold):
        return None
    if _letters(prediction) != _letters(gold):
        return False
    ours, theirs = _read(f"\\boxed{{{_exact(prediction)}}}"), _read(f"${_exact(gold)}$")
    if ours is None or theirs is None:
        return None
    return _identical(ours, theirs)


def _letters(latex: str) -> set[str]:
    return {name for name in _NAME.findall(latex) if len(name) == 1 and name not in "ei"}


def _exact(latex: str) -> str:
    """Decimals as fractions: the grammar would round them to floats."""
    return _DECIMAL.sub(
        lambda d: rf"(\frac{{{int((d[1] or '0') + d[2])}}}{{{10 ** len(d[2])}}})", latex
    )


def _read(latex: str) -> sympy.Expr | None:
    read = parse(latex, _LATEX_ONLY, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not read or not isinstance(read[0], sympy.Expr):
        return None
    named = [(name, sympy.Symbol(str(name))) for name in read[0].free_symbols]
    return read[0].subs([*named, (sympy.Symbol("i"), sympy.I)])


def _identical(a: sympy.Expr, b: sympy.Expr) -> bool | None:
    """Equal at every test point where both are numbers, to 40 digits, relatively."""
    if a == b:
        return True
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    agreed = 0
    for p, q, r, s in _POINTS if names else _POINTS[:1]:
        at = [(x, sympy.Rational(p * s + k * r * q, q * s)) for k, x in enumerate(names)]
        x, y = _number(a, at), _number(b, at)
        if x is None or y is None:
            continue
        if abs(x - y) > _CLOSE * max(abs(x), abs(y)):
            return False if x and y else bool(sympy.simplify(a - b) == 0)
        agreed += 1
    return True if agreed or sympy.simplify(a - b) == 0 else None


def _number(expression: sympy.Expr, at: list[tuple[sympy.Basic, Any]]) -> sympy.Expr | None:
    value = expression.subs(at).doit().evalf(_DIGITS)
    return value if value.is_number and value.is_finite and not value.has(sympy.nan) else None
