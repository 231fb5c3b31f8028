"""Text before mathematics: characters made plain, and macros that change only the looks removed.

NFC only: NFKC would turn 2² into 22.
"""

from __future__ import annotations

import re
import unicodedata

_INVISIBLE = dict.fromkeys(
    [0xAD, 0x61C, 0x180E, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFE0F, 0xFEFF]
)
_PLAIN = str.maketrans(
    {
        "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2013": "-", "\uff0d": "-", "\ufe63": "-",
        "\uff0b": "+", "\uff1d": "=", "\uff0c": ",", "\uff0e": ".", "\uff08": "(", "\uff09": ")",
        "\uff0f": "/", "\uff1c": "<", "\uff1e": ">", "\u2044": "/", "\u2215": "/",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2002": " ", "\u2003": " ", "\u3000": " ",
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    }
)  # fmt: skip


def plain_characters(text: str) -> str | None:
    """NFC, invisible characters dropped, any script's decimal digits, minus signs and full-width
    punctuation made ASCII; None if a control character is inside."""
    if text.isascii():
        return None if _has_control(text) else text
    text = unicodedata.normalize("NFC", text).translate(_INVISIBLE).translate(_PLAIN)
    text = "".join(str(unicodedata.decimal(c)) if c > "\x7f" and c.isdecimal() else c for c in text)
    return None if _has_control(text) else text


_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def _has_control(text: str) -> bool:
    if _ASCII_CONTROL.search(text):
        return True
    return not text.isascii() and any(
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") for c in text if c > "\x7f"
    )


_SIZES = r"tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
_STYLES = (
    r"displaystyle|textstyle|scriptstyle|scriptscriptstyle|limits|nolimits|boldmath|bfseries|"
    r"itshape|rmfamily|bf|it|rm|sf|tt|em|centering|noindent|strut|null|relax|hfill|hfil|"
    r"allowbreak|nonumber|notag|mathstrut"
)
_DROP = re.compile(rf"\\(?:{_SIZES}|{_STYLES})(?![A-Za-z])\s*")
_ARGUMENT_DROP = re.compile(
    r"\\(?:color|hspace|vspace|phantom|hphantom|vphantom|label|tag)\*?\s*"
    r"(?:\[[^\[\]]*\])?\s*\{(?:[^{}]|\{[^{}]*\})*\}|\\rule\s*\{[^{}]*\}\s*\{[^{}]*\}|\\color\s+[A-Za-z]+\b|\\phantom\s*[^\s{]"
)
_FONTS = re.compile(
    r"\\(?:mathbf|mathit|mathsf|mathtt|mathnormal|mathop|mathord|boldsymbol|bm|pmb|emph|underline|"
    r"uline|ensuremath|(?:textcolor|colorbox|fcolorbox)\s*(?:\[[^\[\]]*\])?\s*\{[^{}]*\})"
    r"(?![A-Za-z])\s*"
)
_TEXTS = re.compile(
    r"\\(?:text|textrm|textnormal|textup|textmd|textbf|textit|textsl|textsf|texttt|textsc|mathrm|"
    r"mbox|hbox|operatorname)\*?\s*(?=\{)"
)
_TEXT_OF_NO_WORD = re.compile(r"\\text(\{\s*[^{}A-Za-z]*(?:[a-fijkn-rt-z]\s*)?[^{}A-Za-z]*\})")
_SPACES = re.compile(
    r"(\\\\)|\\(?:[,;:>\s()\[\]$]|(?:quad|qquad|enspace|thinspace|medspace|space)(?![A-Za-z]))|[~$]"
)
_CLOSE_UP = re.compile(r"\\!\s*")
_LONE_BACKSLASH = re.compile(r"(?<!\\)\\$")
_BIG = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?")


def plain_latex(text: str) -> str:
    r"""The same mathematics without fonts, colours, sizes, spacing and math-mode delimiters.

    Words stay in `\text{..}`, whatever macro wrapped them; `\,` and its kin become a space, `\!`
    and `{,}` close up.
    """
    text = " ".join(text.split())
    if "\\" not in text and "$" not in text and "~" not in text and "{" not in text:
        return text
    text = _ARGUMENT_DROP.sub(" ", text)
    text = _CLOSE_UP.sub("", text).replace("{,}", ",").replace("{}", "")
    text = _SPACES.sub(lambda found: found.group(1) or " ", text)
    text = _FONTS.sub("", _DROP.sub("", text))
    text = _TEXT_OF_NO_WORD.sub(r"\1", _TEXTS.sub(r"\\text", text))
    return _LONE_BACKSLASH.sub("", " ".join(_BIG.sub("", text).split())).strip()
