"""The last stage: are two LaTeX answers the same mathematics? Runs in worker processes only.

math-verify's grammar reads the text (never `sympify`, `parse_expr` or `eval`); equality is decided
here, exactly and relatively, because math-verify's own comparison is absolute to 1e-15 and
takes 0.333333 for 1/3.
"""

from __future__ import annotations

import logging
import re

import sympy
from math_verify import LatexExtractionConfig, parse
from sympy.core.relational import Relational

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
_LATEX_ONLY = [LatexExtractionConfig(boxed_match_priority=0)]
_DECIMAL = re.compile(r"(?<![\w.])(\d*)\.(\d+)(?![\d.])")
_DIGITS = 60
_CLOSE = sympy.Float(10) ** -40
_POINTS = (
    (sympy.Rational(17, 23), sympy.Rational(5, 41)),
    (sympy.Rational(29, 19), sympy.Rational(7, 43)),
    (sympy.Rational(-31, 37), sympy.Rational(-3, 47)),
)


def same_mathematics(prediction: str, gold: str) -> bool | None:
    """Whether two expressions are identical wherever both are defined; None if either cannot be
    read, or is not an expression."""
    ours, theirs = _read(f"\\boxed{{{_exact(prediction)}}}"), _read(f"${_exact(gold)}$")
    if ours is None or theirs is None:
        return None
    if ours == theirs:
        return True
    if isinstance(ours, Relational) or isinstance(theirs, Relational):
        return None
    if isinstance(ours, sympy.MatrixBase) and isinstance(theirs, sympy.MatrixBase):
        return ours.shape == theirs.shape and all(
            _identical(a, b) for a, b in zip(ours, theirs, strict=True)
        )
    if not isinstance(ours, sympy.Expr) or not isinstance(theirs, sympy.Expr):
        return None
    return _identical(ours, theirs)


def _exact(latex: str) -> str:
    """Decimals as fractions: the grammar would round them to floats."""
    return _DECIMAL.sub(
        lambda d: rf"(\frac{{{int((d[1] or '0') + d[2])}}}{{{10 ** len(d[2])}}})", latex
    )


def _read(latex: str) -> sympy.Basic | sympy.MatrixBase | None:
    read = parse(latex, _LATEX_ONLY, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return read[0] if read and not isinstance(read[0], str) else None


def _identical(a: sympy.Expr, b: sympy.Expr) -> bool | None:
    """Equal at every test point where both are numbers, to 40 digits, relatively."""
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    agreed = 0
    for start, step in _POINTS if names else _POINTS[:1]:
        at = {name: start + i * step for i, name in enumerate(names)}
        x, y = _number(a, at), _number(b, at)
        if x is None or y is None:
            continue
        if abs(x - y) > _CLOSE * max(abs(x), abs(y)):
            return bool(sympy.simplify(a - b) == 0) if not (x and y) else False
        agreed += 1
    return True if agreed else (True if sympy.simplify(a - b) == 0 else None)


def _number(expression: sympy.Expr, at: dict[sympy.Symbol, sympy.Rational]) -> sympy.Expr | None:
    value = expression.subs(at).doit().evalf(_DIGITS)
    return value if value.is_number and value.is_finite and not value.has(sympy.nan) else None
