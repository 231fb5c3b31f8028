r"""Exact arithmetic on LaTeX in bounded time: fractions, roots, powers, \pi, e, logarithms, letters.

Two expressions are compared by value at fixed rational points. What stays rational is exact; the
rest carries 60 digits and a bound of its error, so that 1/2^99 is not 1/2^98 and 1.414 is not
\sqrt{2}. Anything outside the grammar, and anything undecided, is left to the symbolic stage.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Callable
from decimal import Context, Decimal, DecimalException, localcontext
from fractions import Fraction
from typing import NamedTuple

_PRECISION = 60
_EPSILON = Decimal(10) ** (2 - _PRECISION)
_CONTEXT = Context(prec=_PRECISION, Emax=10**8, Emin=-(10**8))
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
_BITS = 40_000
"""Longest exact numerator or denominator."""
_POINTS = 3


class Unreadable(Exception):
    """Outside the grammar."""


class Undefined(Exception):
    """No real value at this point."""


class Ball(NamedTuple):
    """A real number known up to an error."""

    middle: Decimal
    error: Decimal


Number = Fraction | Ball
Expression = Callable[[dict[str, Fraction]], Number]


class Algebra(NamedTuple):
    """A readable expression: its value at a point, and the letters it needs."""

    value: Expression
    names: frozenset[str]


def same_value(a: Algebra, b: Algebra) -> bool | None:
    """Whether two expressions agree at every test point where both have a real value; None if
    there is none, or if they hold the imaginary unit and differ."""
    names = sorted(a.names | b.names)
    agreed = 0
    with localcontext(_CONTEXT):
        for index in range(_POINTS if names else 1):
            point = {name: _coordinate(name, index) for name in names}
            try:
                equal = _equal(a.value(point), b.value(point))
            except (Undefined, DecimalException, ZeroDivisionError, OverflowError):
                continue
            if equal is False:
                return None if "i" in names else False
            agreed += equal is True
    return True if agreed >= (2 if names else 1) else None


def ratio_sign(a: Algebra, b: Algebra) -> int | None:
    """The sign of c where a = c b at every test point with one c != 0; 0 without such a c."""
    names = sorted(a.names | b.names)
    ratios: list[Number] = []
    with localcontext(_CONTEXT):
        for index in range(_POINTS):
            point = {name: _coordinate(name, index) for name in names}
            try:
                ratios.append(_divide(a.value(point), b.value(point)))
            except (Undefined, DecimalException, ZeroDivisionError, OverflowError):
                continue
        if len(ratios) < 2:
            return None
        if not all(_equal(ratio, ratios[0]) for ratio in ratios[1:]):
            return 0
        return 1 if _ball(ratios[0]).middle > 0 else -1 if _ball(ratios[0]).middle < 0 else 0


def difference(a: Algebra, b: Algebra) -> Algebra:
    return Algebra(lambda p: _add(a.value(p), _negate(b.value(p))), a.names | b.names)


def constant(a: Algebra) -> Fraction | None:
    """The exact rational value of an expression without letters, if it has one."""
    if a.names:
        return None
    with localcontext(_CONTEXT):
        try:
            value = a.value({})
        except (Undefined, DecimalException, ZeroDivisionError, OverflowError):
            return None
    return value if isinstance(value, Fraction) else None


@functools.lru_cache(maxsize=4096)
def read_algebra(latex: str) -> Algebra | None:
    """Parse plain LaTeX (fonts and spacing gone); None outside the grammar."""
    try:
        return _Parser(latex).parse()
    except (Unreadable, RecursionError):
        return None


def _coordinate(name: str, index: int) -> Fraction:
    seed = zlib.crc32(f"{name}/{index}".encode())
    value = Fraction(seed % 9973 + 3000, 3989)
    return value if index < 2 else -value


def _equal(a: Number, b: Number) -> bool | None:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = _ball(a), _ball(b)
    error = 1000 * (a.error + b.error)
    if abs(a.middle - b.middle) > error:
        return False
    return True if error <= Decimal("1e-30") * max(1, abs(a.middle)) else None


def _ball(x: Number) -> Ball:
    if isinstance(x, Ball):
        return x
    middle = Decimal(x.numerator) / Decimal(x.denominator)
    return Ball(middle, abs(middle) * _EPSILON)


def _sized(x: Fraction) -> Number:
    bits = max(x.numerator.bit_length(), x.denominator.bit_length())
    return x if bits <= _BITS else _ball(x)


def _negate(x: Number) -> Number:
    return -x if isinstance(x, Fraction) else Ball(-x.middle, x.error)


def _add(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _sized(a + b)
    a, b = _ball(a), _ball(b)
    middle = a.middle + b.middle
    return Ball(middle, a.error + b.error + abs(middle) * _EPSILON)


def _multiply(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _sized(a * b)
    a, b = _ball(a), _ball(b)
    middle = a.middle * b.middle
    error = abs(a.middle) * b.error + abs(b.middle) * a.error + a.error * b.error
    return Ball(middle, error + abs(middle) * _EPSILON)


def _divide(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _sized(a / b)
    a, b = _ball(a), _ball(b)
    if abs(b.middle) <= 1000 * b.error:
        raise Undefined
    middle = a.middle / b.middle
    error = (a.error + abs(middle) * b.error) / (abs(b.middle) - b.error)
    return Ball(middle, error + abs(middle) * _EPSILON)


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Fraction):
        if exponent.denominator == 1 and isinstance(base, Fraction):
            n = exponent.numerator
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(n) * bits <= _BITS:
                if base == 0 and n <= 0:
                    raise Undefined
                return base**n
        if exponent.denominator == 1 and abs(exponent) <= 10_000:
            magnitude = _real_power(_absolute(base), exponent)
            negative = _ball(base).middle < 0 and exponent.numerator % 2
            return _negate(magnitude) if negative else magnitude
        if isinstance(base, Fraction) and base >= 0 and (root := _exact_root(base, exponent)):
            return root
    return _real_power(base, exponent)


def _exact_root(base: Fraction, exponent: Fraction) -> Fraction | None:
    """base ** exponent where that is rational and small."""
    if exponent.denominator > 12 or abs(exponent.numerator) > 50 or base == 0:
        return None
    parts = [_integer_root(n, exponent.denominator) for n in (base.numerator, base.denominator)]
    if parts[0] is None or parts[1] is None:
        return None
    return Fraction(parts[0], parts[1]) ** exponent.numerator


def _integer_root(n: int, k: int) -> int | None:
    if n.bit_length() > 900:
        return None
    root = math.isqrt(n) if k == 2 else round(n ** (1 / k))
    return root if root**k == n else None


def _real_power(base: Number, exponent: Number) -> Number:
    x, y = _ball(base), _ball(exponent)
    if x.middle <= 1000 * x.error:
        if isinstance(base, Fraction) and base == 0 and y.middle > 0:
            return Fraction(0)
        raise Undefined
    logarithm = _multiply(_logarithm(base), exponent)
    return _exponential(logarithm)


def _exponential(x: Number) -> Number:
    x = _ball(x)
    if x.error > Decimal("1e-6"):
        raise Undefined
    value = x.middle.exp()
    return Ball(value, value * (2 * x.error + _EPSILON))


def _logarithm(x: Number) -> Number:
    x = _ball(x)
    if x.middle <= 1000 * x.error:
        raise Undefined
    value = x.middle.ln()
    return Ball(value, 2 * x.error / x.middle + max(abs(value), 1) * _EPSILON)


def _root(x: Number, degree: Number) -> Number:
    if isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2:
        if _ball(x).middle < 0:
            return _negate(_power(_negate(x), 1 / degree))
    elif isinstance(x, Fraction) and x < 0:
        raise Undefined
    return _power(x, _divide(Fraction(1), degree))


def _absolute(x: Number) -> Number:
    return abs(x) if isinstance(x, Fraction) else Ball(abs(x.middle), x.error)


def _factorial(x: Number) -> Number:
    if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= 2000:
        raise Undefined
    return _sized(Fraction(math.factorial(x.numerator)))


def _binomial(n: Number, k: Number) -> Number:
    if not (isinstance(n, Fraction) and isinstance(k, Fraction)):
        raise Undefined
    if n.denominator != 1 or k.denominator != 1 or not (0 <= n <= 10_000 and k >= 0):
        raise Undefined
    return _sized(Fraction(math.comb(n.numerator, k.numerator)))


_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<macro>\\[A-Za-z]+|\\.)|(?P<letter>[A-Za-z])"
    r"|(?P<sign>[-+*/^_(){}!|\[\]])|(?P<end>$)|(?P<other>.))",
    re.DOTALL,
)
_GREEK = {
    *("\\alpha \\beta \\gamma \\delta \\epsilon \\varepsilon \\zeta \\eta \\theta \\vartheta").split(),
    *("\\kappa \\lambda \\mu \\nu \\xi \\rho \\sigma \\tau \\phi \\varphi \\chi \\psi \\omega").split(),
    *("\\Gamma \\Delta \\Theta \\Lambda \\Sigma \\Phi \\Psi \\Omega \\infty \\ell").split(),
}  # fmt: skip
_STARTS = {"number", "letter", "macro"}


class _Parser:
    def __init__(self, latex: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        position = 0
        while True:
            found = _TOKEN.match(latex, position)
            if found is None or found.lastgroup == "other":
                raise Unreadable
            self.tokens.append((found.lastgroup or "", found.group(found.lastgroup or 0)))
            if found.lastgroup == "end":
                break
            position = found.end()
        self.at = 0
        self.names: set[str] = set()

    def parse(self) -> Algebra:
        value = self.sum()
        if self.tokens[self.at][0] != "end":
            raise Unreadable
        return Algebra(value, frozenset(self.names))

    def peek(self) -> str:
        return self.tokens[self.at][1]

    def take(self, text: str) -> bool:
        if self.peek() == text and self.tokens[self.at][0] != "end":
            self.at += 1
            return True
        return False

    def need(self, text: str) -> None:
        if not self.take(text):
            raise Unreadable

    def sum(self) -> Expression:
        value = self.product()
        while (sign := self.peek()) in ("+", "-"):
            self.at += 1
            right = self.product()
            value = _binary(_add, value, right if sign == "+" else _unary(_negate, right))
        return value

    def product(self) -> Expression:
        value = self.signed()
        while True:
            if self.take("*"):
                value = _binary(_multiply, value, self.signed())
            elif self.take("/"):
                value = _binary(_divide, value, self.signed())
            elif self.starts_factor():
                if self.tokens[self.at][0] == "number":
                    raise Unreadable
                value = _binary(_multiply, value, self.factor())
            else:
                return value

    def signed(self) -> Expression:
        if self.take("-"):
            return _unary(_negate, self.signed())
        if self.take("+"):
            return self.signed()
        return self.factor()

    def starts_factor(self) -> bool:
        kind, text = self.tokens[self.at]
        return kind in _STARTS and text not in ("\\right", "\\end") or text in ("(", "{")

    def factor(self) -> Expression:
        kind, text = self.tokens[self.at]
        if kind == "number":
            self.at += 1
            value = self.mixed(Fraction(text)) if "." not in text else _constant(Fraction(text))
        else:
            value = self.base()
        while True:
            if self.take("!"):
                value = _unary(_factorial, value)
            elif self.take("^"):
                value = _binary(_power, value, self.argument(signed=True))
                if self.peek() == "^":
                    raise Unreadable
            else:
                return value

    def mixed(self, whole: Fraction) -> Expression:
        r"""`1\frac{4}{5}` is nine fifths where both parts are plain integers."""
        before, names = self.at, set(self.names)
        if self.take("\\frac"):
            parts = self.integer_argument(), self.integer_argument()
            if parts[0] is not None and parts[1] and self.peek() != "^":
                return _constant(whole + Fraction(parts[0], parts[1]))
            self.at, self.names = before, names
        return _constant(whole)

    def integer_argument(self) -> int | None:
        kind, text = self.tokens[self.at]
        if kind == "number" and "." not in text:
            self.split_digit()
            self.at += 1
            return int(self.tokens[self.at - 1][1])
        if text == "{" and self.tokens[self.at + 2][1] == "}":
            kind, text = self.tokens[self.at + 1]
            if kind == "number" and "." not in text:
                self.at += 3
                return int(text)
        return None

    def split_digit(self) -> None:
        """An unbraced argument is one digit: the 4 of `\\frac43`."""
        text = self.peek()
        if len(text) > 1:
            if not text.isdigit():
                raise Unreadable
            self.tokens[self.at : self.at + 1] = [("number", text[0]), ("number", text[1:])]

    def argument(self, *, signed: bool = False) -> Expression:
        """A braced group or one token, as TeX reads it."""
        if self.take("{"):
            value = self.sum()
            self.need("}")
            return value
        if signed and self.take("-"):
            return _unary(_negate, self.argument())
        if self.tokens[self.at][0] == "number":
            if not signed:
                self.split_digit()
            self.at += 1
            return _constant(Fraction(self.tokens[self.at - 1][1]))
        if self.tokens[self.at][0] in ("letter", "macro"):
            return self.base()
        raise Unreadable

    def base(self) -> Expression:
        kind, text = self.tokens[self.at]
        self.at += 1
        if text in ("(", "{", "["):
            value = self.sum()
            self.need({"(": ")", "{": "}", "[": "]"}[text])
            return value
        if text == "|":
            value = self.sum()
            self.need("|")
            return _unary(_absolute, value)
        if kind == "letter" or text in _GREEK:
            return self.letter(text)
        if text == "\\pi":
            return _constant(Ball(_PI, _EPSILON))
        if text == "\\frac":
            above = self.argument()
            return _binary(_divide, above, self.argument())
        if text == "\\binom":
            above = self.argument()
            return _binary(_binomial, above, self.argument())
        if text == "\\sqrt":
            degree = _constant(Fraction(2))
            if self.take("["):
                degree = self.sum()
                self.need("]")
            return _binary(_root, self.argument(), degree)
        if text == "\\ln":
            return _unary(_logarithm, self.operand())
        if text == "\\exp":
            return _unary(_exponential, self.operand())
        if text == "\\log" and self.take("_"):
            base = self.argument()
            return _binary(lambda x, b: _divide(_logarithm(x), _logarithm(b)), self.operand(), base)
        raise Unreadable

    def operand(self) -> Expression:
        """What a function without brackets applies to: one factor, `2x` of `\\ln 2x` refused."""
        value = self.factor()
        if self.starts_factor():
            raise Unreadable
        return value

    def letter(self, text: str) -> Expression:
        if text == "e":
            if self.peek() != "_":
                return lambda point: _exponential(Fraction(1))
        name = text
        if self.take("_"):
            if self.take("{"):
                while not self.take("}"):
                    kind, part = self.tokens[self.at]
                    if kind not in ("number", "letter"):
                        raise Unreadable
                    name += f"_{part}"
                    self.at += 1
            else:
                kind, part = self.tokens[self.at]
                if kind not in ("number", "letter"):
                    raise Unreadable
                name += f"_{part}"
                self.at += 1
        self.names.add(name)
        return lambda point: point[name]


def _constant(value: Number) -> Expression:
    return lambda point: value


def _unary(operation: Callable[[Number], Number], x: Expression) -> Expression:
    return lambda point: operation(x(point))


def _binary(
    operation: Callable[[Number, Number], Number], x: Expression, y: Expression
) -> Expression:
    return lambda point: operation(x(point), y(point))
