r"""The shape of a mathematical answer: list, tuple, interval, union, matrix, relation, words, base.

Brackets, order and relations are read here, once, for both sides, so that the mathematics that
remains is always one expression against one other.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from .surface import plain_latex
from .units import without_unit

Shape = Literal["leaf", "words", "base", "list", "tuple", "union", "matrix", "relation"]

_NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])\s?|[×·⋅∗∙]", "*"),
        (r"\\div(?![A-Za-z])\s?|÷", "/"),
        (r"\\(?:leq|leqslant|leqq)(?![A-Za-z])|≤|⩽|<=", r"\\le "),
        (r"\\(?:geq|geqslant|geqq)(?![A-Za-z])|≥|⩾|>=", r"\\ge "),
        (r"\\(?:neq|not\s*=)(?![A-Za-z])|≠|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])\s?", "<"),
        (r"\\gt(?![A-Za-z])\s?", ">"),
        (r"\\%|％", "%"),
        (r"\\(?:lbrace|\{)", r"\\{"),
        (r"\\(?:rbrace|\})", r"\\}"),
        (r"\\[lr]?vert(?![A-Za-z])|\\mid(?![A-Za-z])", "|"),
        (r"\\(?:varnothing)(?![A-Za-z])|∅|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\(?:mathbb\s*\{?\s*R\s*\}?|R(?![A-Za-z]))|ℝ", r"(-\\infty,\\infty)"),
        (r"π", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"\\infin(?![A-Za-z])", r"\\infty"),
        (r"∪", r"\\cup "),
        (r"∈", r"\\in "),
        (r"±", r"\\pm "),
        (r"∓", r"\\mp "),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"¹", "^1"),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"⁴", "^4"),
        (r"\\(?:bmatrix|vmatrix)", r"\\pmatrix"),
        (r"\{([^{}]+)\\over(?![A-Za-z])([^{}]+)\}", r"\\frac{\1}{\2}"),
        (r"\{([^{}]+)\\choose(?![A-Za-z])([^{}]+)\}", r"\\binom{\1}{\2}"),
        (r"\\(?:text)?\{([0-9A-Z]+)\}(?=\s*_)", r"\1"),
        (r"^([^:]*[^:\s])\s*:\s*(?=[1-9(])([^:]*)$", r"\\frac{\1}{\2}"),
        (r"\*\*(?=\s*[\d{(-])", "^"),
    )
]
_DEGREE = re.compile(
    r"\s*(?:\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))|\\degree|°|º)"
)
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_SEPARATOR = re.compile(
    r"\s*,?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}|\b(?:and|or)\b)\s*|\s*;\s*"
)
_TEXT_COMMA = re.compile(r"\\text\{\s*(,\s*(?:and|or)?)\s*\}")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d,])")
_RELATION = re.compile(
    r"(\\(?:le|ge|ne|in|notin|approx|equiv|sim|cong|simeq|propto|subset|subseteq|to|rightarrow|"
    r"Rightarrow|implies|iff)(?![A-Za-z])|[=<>≈≡])"
)
_WORDS = re.compile(r"\\text\{([^{}]*)\}|([A-Za-z]{3,}(?:[' -][A-Za-z]{2,})*)")
_CHOICE = re.compile(r"\\text\{\s*\(?([A-Za-z])\)?\s*\}|\(\s*(?:\\text\{)?([A-Z])\}?\s*\)|([A-Z])")
_BASE = re.compile(r"([+-]?[0-9A-Z]*\d[0-9A-Z]*)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_PREFIX = re.compile(
    r"^\\text\{\s*(?:the )?(?:final )?(?:answer|choice|option)?\s*(?:is|:)?\s*\}\s*:?"
    r"|^\\text\{\s*\([A-E]\)\s*\}\s*(?=\S)|[€£¥]",
    re.IGNORECASE,
)
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")
_OPEN = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", "\\begin"}
_CLOSE = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil", "\\end"}
_PIECE = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)


class Answer(NamedTuple):
    """A parsed answer."""

    shape: Shape
    text: str
    """Plain LaTeX of the whole; of words, their letters in lower case."""
    items: tuple[Answer, ...] = ()
    mark: str = ""
    """Brackets of a tuple, operators of a relation, rows x columns of a matrix, a base."""


def read_answer(latex: str) -> Answer:
    """Parse an answer; whatever is nothing else is a leaf."""
    text = plain_latex(latex)
    text = _DEGREE.sub(r"\\frac{\\pi}{180}" if _ANGLE.search(text) else "", text)
    text = _REPEATING.sub(_repeating, text)
    for pattern, replacement in _NAMES:
        text = pattern.sub(replacement, text)
    text = _PREFIX.sub("", text.strip()).strip().rstrip(".,;:\\ ").strip()
    return _read(text, top=True)


def _repeating(number: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, fixed, period = number.groups()
    value = int(whole + fixed + period) - int(whole + fixed or "0")
    return rf"\frac{{{value}}}{{{'9' * len(period) + '0' * len(fixed)}}}"


def squashed(text: str) -> str:
    """Text for literal comparison: no spaces, no needless braces around one character."""
    text = re.sub(r"\s+", "", _BETWEEN_DIGITS.sub("_", text))
    return re.sub(r"(?<![A-Za-z])\{(\w)\}", r"\1", text)


def words_of(text: str) -> str:
    """The letters and digits of a text, in lower case."""
    return re.sub(r"[\W_]+", "", text.replace("\\text", "")).casefold()


def _read(text: str, *, top: bool = False) -> Answer:
    text = text.strip()
    while (inside := _enclosed(text)) and inside[0] == "{":
        text = inside[1]
    if matrix := _MATRIX.fullmatch(text):
        return _read_matrix(text, matrix)
    if choice := _CHOICE.fullmatch(text):
        return Answer("words", "".join(g or "" for g in choice.groups()).casefold())
    if words := _WORDS.fullmatch(text):
        said = words.group(1) or words.group(2) or ""
        parts = [part for part in re.split(r"\s*(?:,|;|\band\b|\bor\b)\s*", said) if part]
        if top and len(parts) > 1:
            return _list(text, [f"\\text{{{part}}}" for part in parts])
        return Answer("words", words_of(said))
    separated = _TEXT_COMMA.sub(r" \1 ", text)
    if top:
        separated = _THOUSANDS.sub(lambda n: n[1] + n[2].replace(",", ""), separated)
        separated = _SPACED_THOUSANDS.sub(lambda n: n[1] + n[2].replace(" ", ""), separated)
        items = split(_outer_separators(separated), ",")
        if len(items) > 1:
            return _list(text, items)
    return _read_one(without_unit(separated))


def _outer_separators(text: str) -> str:
    return _SEPARATOR.sub(",", text)


def _list(text: str, items: list[str]) -> Answer:
    parsed: list[Answer] = []
    for item in items:
        one = _read(item)
        parsed.extend(one.items if one.shape == "list" else (one,))
    return Answer("list", text, tuple(parsed))


def _read_one(text: str) -> Answer:
    pieces = _split_relation(text)
    if len(pieces) > 1:
        operators, sides = pieces[1::2], pieces[::2]
        if operators == ["\\in"] and re.fullmatch(r"\\?[A-Za-z]+(_\w)?", sides[0].strip()):
            return _read(sides[1])
        return Answer("relation", text, tuple(map(_read, sides)), " ".join(operators))
    unions = split(text, "\\cup")
    if len(unions) > 1:
        return Answer("union", text, tuple(map(_read, unions)))
    if inside := _enclosed(text):
        start, inner, end = inside
        if start == "(" and (matrix := _MATRIX.fullmatch(inner)):
            return _read_matrix(text, matrix)
        items = split(inner, ",")
        if start == "\\{":
            return (
                _list(text, items)
                if len(items) > 1
                else Answer("tuple", text, (_read(inner, top=True),), "{}")
            )
        if len(items) > 1 or start == "[":
            return Answer("tuple", text, tuple(map(_read, items)), start + end)
    if "\\pm" in text or "\\mp" in text:
        plus = text.replace("\\pm", "+").replace("\\mp", "-")
        minus = text.replace("\\pm", "-").replace("\\mp", "+")
        return Answer("list", text, (_read_one(plus), _read_one(minus)))
    if base := _BASE.fullmatch(text):
        number = base.group(2) or base.group(3)
        if number == "10":
            return Answer("leaf", base.group(1))
        return Answer("base", text, (), f"{base.group(1).lstrip('+0')}_{number}")
    return Answer("leaf", text)


def _read_matrix(text: str, matrix: re.Match[str]) -> Answer:
    body = re.sub(r"\\\\\s*(?:\[[^\]]*\])?", "\n", matrix.group(2)).strip("\n ")
    rows = [row.split("&") for row in body.split("\n")]
    cells = tuple(_read(cell) for row in rows for cell in row)
    kind = "|" if matrix.group(1) == "vmatrix" else ""
    return Answer("matrix", text, cells, kind + "x".join(str(len(row)) for row in rows))


def split(text: str, separator: str) -> list[str]:
    """Split at a comma or a macro that stands outside all brackets."""
    parts, depth, start = [], 0, 0
    for piece in _PIECE.finditer(text):
        token = piece.group()
        if token in _OPEN:
            depth += 1
        elif token in _CLOSE:
            depth -= 1
        elif token == separator and depth == 0:
            parts.append(text[start : piece.start()].strip())
            start = piece.end()
    return [*parts, text[start:].strip()]


def _split_relation(text: str) -> list[str]:
    """Sides and operators in turn, operators outside all brackets only."""
    pieces, depth, start = [], 0, 0
    for piece in _PIECE.finditer(text):
        token = piece.group()
        if token in _OPEN:
            depth += 1
        elif token in _CLOSE:
            depth -= 1
        elif depth == 0 and _RELATION.fullmatch(token):
            pieces += [text[start : piece.start()], token]
            start = piece.end()
    return [*pieces, text[start:]]


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, inside and closing bracket, if one pair encloses the whole text."""
    tokens = list(_PIECE.finditer(text))
    if len(tokens) < 3 or tokens[0].group() not in ("(", "[", "{", "\\{", "\\langle"):
        return None
    depth = 0
    for token in tokens:
        depth += (token.group() in _OPEN) - (token.group() in _CLOSE)
        if depth == 0 and token is not tokens[-1]:
            return None
    if depth:
        return None
    first, last = tokens[0].group(), tokens[-1].group()
    return first, text[len(first) : tokens[-1].start()].strip(), last
