r"""The grammar of plain LaTeX expressions, as functions from a point to a number.

`2x`, `1\frac{4}{5}` (nine fifths), `\frac43`, `\sqrt[3]{2}`, `x_1^2`, `\sin^2 5x`, `5!`,
`\binom{5}{2}`, `\log_2 8`, `|x|`. It reads; it never evaluates text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from . import numbers as n
from .numbers import ONE, Number

FREE_BASE = "log base"
"""The base of a bare logarithm, ten for some and e for others, as one more letter."""
Point = dict[str, Fraction]
Expression = Callable[[Point], Number]


class Unreadable(Exception):
    """Outside the grammar."""


_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<macro>\\[A-Za-z]+)|(?P<letter>[A-Za-z])"
    r"|(?P<sign>[-+*/^_(){}!|\[\]])|(?P<end>$)|(?P<other>.))",
    re.DOTALL,
)
_LETTERS = frozenset(
    [r"\alpha", r"\beta", r"\gamma", r"\delta", r"\epsilon", r"\varepsilon", r"\zeta", r"\eta",
     r"\theta", r"\vartheta", r"\kappa", r"\lambda", r"\mu", r"\nu", r"\xi", r"\rho", r"\sigma",
     r"\tau", r"\phi", r"\varphi", r"\chi", r"\psi", r"\omega", r"\Gamma", r"\Delta", r"\Theta",
     r"\Lambda", r"\Sigma", r"\Phi", r"\Psi", r"\Omega", r"\infty", r"\ell", r"\triangle"]
)  # fmt: skip
_BRACKETS = {"(": ")", "{": "}", "[": "]", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}
_AROUND = {
    "\\lfloor": n.floor,
    "\\lceil": lambda x: n.negate(n.floor(n.negate(x))),
    "|": n.absolute,
}
_FUNCTIONS: dict[str, Callable[[Number], Number]] = {
    "\\ln": n.logarithm,
    "\\exp": n.exponential,
    "\\sin": n.sine,
    "\\cos": n.cosine,
    "\\tan": lambda x: n.divide(n.sine(x), n.cosine(x)),
    "\\cot": lambda x: n.divide(n.cosine(x), n.sine(x)),
    "\\sec": lambda x: n.divide(ONE, n.cosine(x)),
    "\\csc": lambda x: n.divide(ONE, n.sine(x)),
}
_CLOSERS = frozenset(_BRACKETS.values()) | {"\\end", "\\right"}


class Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, latex: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        position, kind = 0, ""
        while kind != "end":
            found = _TOKEN.match(latex, position)
            kind = (found and found.lastgroup) or "other"
            if found is None or kind == "other":
                raise Unreadable
            self.tokens.append((kind, found.group(kind)))
            position = found.end()
        self.at = 0
        self.bars = False
        self.names: set[str] = set()

    def parse(self) -> tuple[Expression, frozenset[str]]:
        """The whole text as an expression, and the letters in it."""
        value = self.sum()
        if self.kind != "end":
            raise Unreadable
        return value, frozenset(self.names)

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def text(self) -> str:
        return self.tokens[self.at][1]

    def take(self, text: str) -> bool:
        if self.text != text:
            return False
        self.at += 1
        return True

    def need(self, text: str) -> None:
        if not self.take(text):
            raise Unreadable

    def sum(self) -> Expression:
        value = self.product()
        while (sign := self.text) in ("+", "-"):
            self.at += 1
            right = self.product()
            value = _binary(n.add, value, right if sign == "+" else _unary(n.negate, right))
        return value

    def product(self) -> Expression:
        value = self.signed()
        while True:
            if self.take("*"):
                value = _binary(n.multiply, value, self.signed())
            elif self.take("/"):
                value = _binary(n.divide, value, self.signed())
            elif self.starts_factor():
                value = _binary(n.multiply, value, self.factor())
            else:
                return value

    def signed(self) -> Expression:
        if self.take("-"):
            return _unary(n.negate, self.signed())
        return self.signed() if self.take("+") else self.factor()

    def starts_factor(self) -> bool:
        if self.text == "|":
            return not self.bars
        opens = self.kind in ("letter", "macro") or self.text in ("(", "{")
        return opens and self.text not in _CLOSERS

    def factor(self) -> Expression:
        value = self.number() if self.kind == "number" else self.base()
        while True:
            if self.take("!"):
                value = _unary(n.factorial, value)
            elif self.take("^"):
                value = _binary(n.power, value, self.exponent())
                if self.text == "^":
                    raise Unreadable
            else:
                return value

    def number(self) -> Expression:
        r"""A number; `1\frac{4}{5}` and `1 4/5` are nine fifths if all parts are integers."""
        whole = Fraction(self.text)
        integer = self.text.isdigit()
        self.at += 1
        start = self.at
        if integer and self.kind == "number":
            above = self.integer()
            if above is not None and self.take("/") and (below := self.integer()):
                return _constant(whole + Fraction(above, below))
            raise Unreadable
        if integer and self.take("\\frac"):
            above, below = self.integer(), self.integer()
            if above is not None and below and self.text != "^":
                return _constant(whole + Fraction(above, below))
            self.at = start
        return _constant(whole)

    def integer(self) -> int | None:
        """A plain integer argument; None, and nothing usable taken, if there is none."""
        if self.kind == "number" and self.text.isdigit():
            if self.tokens[self.at - 1][1] == "\\frac" or self.tokens[self.at - 2][1] == "\\frac":
                self.split_digit()
            self.at += 1
            return int(self.tokens[self.at - 1][1])
        if self.text == "{" and [kind for kind, _ in self.tokens[self.at + 1 : self.at + 3]] == [
            "number",
            "sign",
        ]:
            inside, close = self.tokens[self.at + 1][1], self.tokens[self.at + 2][1]
            if inside.isdigit() and close == "}":
                self.at += 3
                return int(inside)
        return None

    def split_digit(self) -> None:
        r"""An argument without braces is one digit: the 4 of `\frac43`."""
        digits = self.text
        if not digits.isdigit():
            raise Unreadable
        if len(digits) > 1:
            self.tokens[self.at : self.at + 1] = [("number", digits[0]), ("number", digits[1:])]

    def argument(self) -> Expression:
        """A braced group or one token, as TeX reads it."""
        if self.take("{"):
            return self.group("{")
        if self.kind == "number":
            self.split_digit()
            self.at += 1
            return _constant(Fraction(self.tokens[self.at - 1][1]))
        if self.kind in ("letter", "macro"):
            return self.base()
        raise Unreadable

    def exponent(self) -> Expression:
        """As an argument, but `2^10` and `2^-1` mean what people mean by them."""
        if self.take("-"):
            return _unary(n.negate, self.exponent())
        if self.kind == "number":
            self.at += 1
            return _constant(Fraction(self.tokens[self.at - 1][1]))
        if self.take("("):
            return self.group("(")
        return self.argument()

    def group(self, opening: str) -> Expression:
        """What follows an opening bracket, its closing one included."""
        bars, self.bars = self.bars, opening == "|"
        value = self.sum()
        self.need(_BRACKETS[opening])
        self.bars = bars
        return _unary(_AROUND[opening], value) if opening in _AROUND else value

    def base(self) -> Expression:
        kind, text = self.kind, self.text
        self.at += 1
        if text in _BRACKETS:
            return self.group(text)
        if kind == "letter" or text in _LETTERS:
            return self.letter(text)
        if text == "\\pi":
            return _constant(n.PI)
        if text in ("\\frac", "\\binom"):
            above = self.argument()
            return _binary(n.divide if text == "\\frac" else n.binomial, above, self.argument())
        if text == "\\sqrt":
            degree = self.group("[") if self.take("[") else _constant(Fraction(2))
            return _binary(n.root, self.argument(), degree)
        if text in _FUNCTIONS or text in ("\\log", "\\lg"):
            return self.function(text)
        raise Unreadable

    def function(self, name: str) -> Expression:
        r"""`\sin^2 5x \cos x` is sin(5x)^2 cos(x); `\sin(x) y` is sin(x) y."""
        base = exponent = None
        if name == "\\lg":
            base = _constant(Fraction(10))
        if name == "\\log" and self.take("_"):
            base = self.argument()
        if self.take("^"):
            if self.text in ("-", "{") and self.tokens[self.at + (self.text == "{")][1] == "-":
                raise Unreadable
            exponent = self.argument()
        if self.text in ("(", "{", "["):
            value = self.base()
        else:
            value = self.factor()
            while self.starts_factor() and not self.starts_function():
                value = _binary(n.multiply, value, self.factor())
        if name in _FUNCTIONS:
            value = _unary(_FUNCTIONS[name], value)
        else:
            value = _unary(n.logarithm, value)
            if base is None:
                self.names.add(FREE_BASE)
                base = lambda point: point[FREE_BASE]
                value = _binary(n.multiply, value, base)
            else:
                value = _binary(n.divide, value, _unary(n.logarithm, base))
        return _binary(n.power, value, exponent) if exponent else value

    def starts_function(self) -> bool:
        return self.text in _FUNCTIONS or self.text in ("\\log", "\\lg")

    def letter(self, text: str) -> Expression:
        if self.text != "_":
            if text == "e":
                return lambda point: n.exponential(ONE)
            if text == "i":
                return _constant(n.I)
        while self.take("_"):
            closing = self.take("{")
            while self.kind in ("number", "letter"):
                text += f"_{self.text}"
                self.at += 1
                if not closing:
                    break
            if closing:
                self.need("}")
        self.names.add(text)
        return lambda point: point[text]


def _constant(value: Number) -> Expression:
    return lambda point: value


def _unary(operation: Callable[[Number], Number], x: Expression) -> Expression:
    return lambda point: operation(x(point))


def _binary(
    operation: Callable[[Number, Number], Number], x: Expression, y: Expression
) -> Expression:
    return lambda point: operation(x(point), y(point))
