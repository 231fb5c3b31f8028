"""Numbers in bounded time: exact fractions, reals with an error bound, and pairs of either.

What can stay a fraction does; the rest carries 60 digits and the bound of its rounding error, so
that equality is exact or relative and never absolute: 1/2^99 is not 1/2^98.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, DecimalException
from fractions import Fraction
from typing import NamedTuple

PRECISION = 60
CONTEXT = Context(prec=PRECISION, Emax=10**8, Emin=-(10**8))
_EPSILON = Decimal(10) ** (2 - PRECISION)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
_BITS = 40_000
"""Longest exact numerator or denominator."""


class Undefined(Exception):
    """No value here: division by zero, a logarithm of a negative number, or too large."""


NO_VALUE = (Undefined, DecimalException, ZeroDivisionError, OverflowError, RecursionError)
"""What evaluation may raise where there is no value."""


class Ball(NamedTuple):
    """A real number known up to an error."""

    middle: Decimal
    error: Decimal


class Complex(NamedTuple):
    real: Fraction | Ball
    imaginary: Fraction | Ball


Real = Fraction | Ball
Number = Fraction | Ball | Complex
ZERO, ONE = Fraction(0), Fraction(1)
PI = Ball(_PI, _EPSILON)
I = Complex(ZERO, ONE)  # noqa: E741


def equal(a: Number, b: Number) -> bool | None:
    """None if the errors are too large to tell."""
    if isinstance(a, Complex) or isinstance(b, Complex):
        a, b = _pair(a), _pair(b)
        parts = equal(a.real, b.real), equal(a.imaginary, b.imaginary)
        return False if False in parts else None if None in parts else True
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = ball(a), ball(b)
    error = 1000 * (a.error + b.error)
    if abs(a.middle - b.middle) > error:
        return False
    return True if error <= Decimal("1e-30") * max(1, abs(a.middle)) else None


def ball(x: Number) -> Ball:
    """The number as a ball; `Undefined` for one off the real line."""
    if isinstance(x, Ball):
        return x
    if isinstance(x, Complex):
        return ball(_real(x))
    middle = Decimal(x.numerator) / Decimal(x.denominator)
    return Ball(middle, abs(middle) * _EPSILON)


def negate(x: Number) -> Number:
    if isinstance(x, Fraction):
        return -x
    if isinstance(x, Ball):
        return Ball(-x.middle, x.error)
    return Complex(_negate(x.real), _negate(x.imaginary))


def add(a: Number, b: Number) -> Number:
    if isinstance(a, Complex) or isinstance(b, Complex):
        a, b = _pair(a), _pair(b)
        return Complex(_add(a.real, b.real), _add(a.imaginary, b.imaginary))
    return _add(a, b)


def multiply(a: Number, b: Number) -> Number:
    if isinstance(a, Complex) or isinstance(b, Complex):
        (p, q), (r, s) = _pair(a), _pair(b)
        return Complex(
            _add(_multiply(p, r), _negate(_multiply(q, s))),
            _add(_multiply(p, s), _multiply(q, r)),
        )
    return _multiply(a, b)


def divide(a: Number, b: Number) -> Number:
    if isinstance(b, Complex):
        norm = _add(_multiply(b.real, b.real), _multiply(b.imaginary, b.imaginary))
        a = multiply(a, Complex(b.real, _negate(b.imaginary)))
        b = norm
    if isinstance(a, Complex):
        return Complex(_divide(a.real, b), _divide(a.imaginary, b))
    return _divide(a, b)


def power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Complex):
        return _complex_exponential(multiply(exponent, logarithm(base)))
    if isinstance(base, Complex):
        return _complex_power(base, exponent)
    if isinstance(exponent, Fraction):
        if exponent.denominator == 1 and isinstance(base, Fraction):
            n = exponent.numerator
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(n) * bits <= _BITS:
                if base == 0 and n <= 0:
                    raise Undefined
                return base**n
        if exponent.denominator == 1 and abs(exponent) <= 10_000:
            magnitude = _real_power(absolute(base), exponent)
            return negate(magnitude) if _negative(base) and exponent % 2 else magnitude
        exact = _exact_power(base, exponent) if isinstance(base, Fraction) and base > 0 else None
        if exact is not None:
            return exact
    return _real_power(base, exponent)


def root(x: Number, degree: Number) -> Number:
    r"""The real root; of a negative number, the principal one of a square root."""
    if not isinstance(x, Complex) and _negative(x):
        if degree == 2:
            return multiply(I, root(negate(x), degree))
        if isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2:
            return negate(root(negate(x), degree))
        raise Undefined
    return power(x, divide(ONE, degree))


def absolute(x: Number) -> Real:
    if isinstance(x, Complex):
        squares = _add(_multiply(x.real, x.real), _multiply(x.imaginary, x.imaginary))
        return _real(root(squares, Fraction(2)))
    return abs(x) if isinstance(x, Fraction) else Ball(abs(x.middle), x.error)


def exponential(x: Number) -> Number:
    if isinstance(x, Complex):
        return _complex_exponential(x)
    x = ball(x)
    if x.error > Decimal("1e-6"):
        raise Undefined
    value = x.middle.exp()
    return Ball(value, value * (2 * x.error + _EPSILON))


def logarithm(x: Number) -> Real:
    if x == 1:
        return ZERO
    x = ball(x)
    if x.middle <= 1000 * x.error:
        raise Undefined
    value = x.middle.ln()
    return Ball(value, 2 * x.error / x.middle + max(abs(value), Decimal(1)) * _EPSILON)


def sine(x: Number) -> Real:
    return _trigonometric(x)[0]


def cosine(x: Number) -> Real:
    return _trigonometric(x)[1]


def factorial(x: Number) -> Number:
    n = _whole(x, 2000)
    return _sized(Fraction(math.factorial(n)))


def binomial(n: Number, k: Number) -> Number:
    return _sized(Fraction(math.comb(_whole(n, 10_000), _whole(k, 10_000))))


def floor(x: Number) -> Number:
    if isinstance(x, Fraction):
        return Fraction(math.floor(x))
    x = ball(x)
    low, high = math.floor(x.middle - x.error), math.floor(x.middle + x.error)
    if low != high:
        raise Undefined
    return Fraction(low)


def _pair(x: Number) -> Complex:
    return x if isinstance(x, Complex) else Complex(x, ZERO)


def _real(x: Number) -> Real:
    if not isinstance(x, Complex):
        return x
    if equal(x.imaginary, ZERO):
        return x.real
    raise Undefined


def _negative(x: Real) -> bool:
    return x < 0 if isinstance(x, Fraction) else x.middle < 0


def _sized(x: Fraction) -> Real:
    bits = max(x.numerator.bit_length(), x.denominator.bit_length())
    return x if bits <= _BITS else ball(x)


def _negate(x: Real) -> Real:
    return -x if isinstance(x, Fraction) else Ball(-x.middle, x.error)


def _add(a: Real, b: Real) -> Real:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _sized(a + b)
    a, b = ball(a), ball(b)
    middle = a.middle + b.middle
    return Ball(middle, a.error + b.error + abs(middle) * _EPSILON)


def _multiply(a: Real, b: Real) -> Real:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _sized(a * b)
    a, b = ball(a), ball(b)
    middle = a.middle * b.middle
    error = abs(a.middle) * b.error + abs(b.middle) * a.error + a.error * b.error
    return Ball(middle, error + abs(middle) * _EPSILON)


def _divide(a: Real, b: Real) -> Real:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _sized(a / b)
    a, b = ball(a), ball(b)
    if abs(b.middle) <= 1000 * b.error:
        raise Undefined
    middle = a.middle / b.middle
    error = (a.error + abs(middle) * b.error) / (abs(b.middle) - b.error)
    return Ball(middle, error + abs(middle) * _EPSILON)


def _real_power(base: Real, exponent: Real) -> Number:
    x = ball(base)
    if x.middle <= 1000 * x.error:
        if base == 0 and not _negative(exponent) and exponent != 0:
            return ZERO
        raise Undefined
    return exponential(_multiply(logarithm(base), exponent))


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """base ** exponent where that is a small fraction."""
    if exponent.denominator > 12 or abs(exponent.numerator) > 50:
        return None
    above = _integer_root(base.numerator, exponent.denominator)
    below = _integer_root(base.denominator, exponent.denominator)
    return None if above is None or below is None else Fraction(above, below) ** exponent.numerator


def _integer_root(n: int, degree: int) -> int | None:
    if n.bit_length() > 900:
        return None
    found = math.isqrt(n) if degree == 2 else round(n ** (1 / degree))
    return found if found**degree == n else None


def _complex_power(base: Complex, exponent: Real) -> Number:
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) <= 200:
        product: Number = ONE
        for _ in range(abs(exponent.numerator)):
            product = multiply(product, base)
        return product if exponent >= 0 else divide(ONE, product)
    return power(_real(base), exponent)


def _complex_exponential(x: Number) -> Number:
    real, imaginary = _pair(x)
    scale = exponential(real)
    return multiply(scale, Complex(cosine(imaginary), sine(imaginary)))


def _trigonometric(x: Number) -> tuple[Real, Real]:
    """Sine and cosine by their series, after reduction to [-pi, pi]."""
    if x == 0:
        return ZERO, ONE
    x = ball(x)
    if abs(x.middle) > 10**6 or x.error > Decimal("1e-20"):
        raise Undefined
    turns = (x.middle / (2 * _PI)).to_integral_value()
    angle = x.middle - turns * 2 * _PI
    error = x.error + (abs(turns) + 100) * _EPSILON
    sums, term = [Decimal(0), Decimal(0)], Decimal(1)
    for n in range(1, 90):
        sums[(n - 1) % 2] += term if (n - 1) % 4 < 2 else -term
        term = term * angle / n
    return Ball(sums[1], error), Ball(sums[0], error)


def _whole(x: Number, limit: int) -> int:
    if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= limit:
        raise Undefined
    return x.numerator
