"""Charts as inline SVG: no script, no font, no address; colours come from the page's CSS."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 360
"""Of every chart, in its own units: text is 12 high, so a phone shows it at reading size."""


class Mark(NamedTuple):
    """A line of `standing`: a score, with intervals if it is this run's."""

    label: str
    score: float
    inner: Sequence[float] | None = None
    outer: Sequence[float] | None = None
    own: bool = False


def standing(marks: Sequence[Mark]) -> str:
    """Scores on one ruler from 0 to 100 %, one line each."""
    left, right, line = 140, WIDTH - 44, 26
    height = line * len(marks) + 24
    x = lambda score: left + score * (right - left)
    parts = [
        f'<line class="grid" x1="{x(at / 4):.1f}" x2="{x(at / 4):.1f}" y1="4" y2="{height - 20}"/>'
        f'<text class="tick" x="{x(at / 4):.1f}" y="{height - 5}" text-anchor="middle">'
        f"{25 * at}</text>"
        for at in range(5)
    ]
    for row, mark in enumerate(marks):
        y = 4 + line * row + line / 2
        kind = "own" if mark.own else "other"
        parts.append(
            f'<text class="label {kind}" x="{left - 8}" y="{y + 4}" text-anchor="end">'
            f"{escape(_short(mark.label, 21))}</text>"
        )
        for interval, name in ((mark.outer, "outer"), (mark.inner, "inner")):
            if interval is not None:
                low, high = map(x, interval)
                parts.append(
                    f'<line class="{name}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
                )
        wide = mark.inner is not None and x(mark.inner[1]) - x(mark.inner[0]) > 10
        dot, radius = ("spot", 2.5) if wide else (kind, 5)  # inside its interval, or instead of it
        parts.append(f'<circle class="dot {dot}" cx="{x(mark.score):.1f}" cy="{y}" r="{radius}"/>')
        parts.append(
            f'<text class="value {kind}" x="{WIDTH - 2}" y="{y + 4}" text-anchor="end">'
            f"{100 * mark.score:.1f}</text>"
        )
    return _svg(height, "Scores in percent", parts)


def curve(points: Sequence[tuple[str, float]], label: str) -> str:
    """A line over evenly spaced, named points; y from 0 to 100 %."""
    left, right, top, bottom = 34, WIDTH - 22, 22, 150
    step = (right - left) / max(1, len(points) - 1)
    at = [
        (left + step * i if len(points) > 1 else (left + right) / 2, _y(score, top, bottom))
        for i, (_, score) in enumerate(points)
    ]
    parts = _grid(left, right + 10, top, bottom)
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>')
    for (x, y), (name, score) in zip(at, points, strict=True):
        parts.append(
            f'<circle class="dot own" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
            f'<text class="value" x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">'
            f"{100 * score:.0f}</text>"
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{escape(name)}</text>"
        )
    return _svg(bottom + 24, label, parts)


class Bar(NamedTuple):
    """A column of counts, right below wrong, with a note above."""

    name: str
    right: int
    wrong: int
    note: str


def bars(bars: Sequence[Bar], label: str) -> str:
    """Columns of counts side by side."""
    left, right, top, bottom = 6, WIDTH - 6, 22, 150
    most = max((bar.right + bar.wrong for bar in bars), default=1) or 1
    step = (right - left) / max(1, len(bars))
    width = min(step * 0.72, 64)
    parts = [f'<line class="grid" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    for i, bar in enumerate(bars):
        x = left + step * (i + 0.5)
        tall, low = ((bottom - top) * n / most for n in (bar.right + bar.wrong, bar.right))
        parts.append(
            f'<rect class="wrong" x="{x - width / 2:.1f}" y="{bottom - tall:.1f}" '
            f'width="{width:.1f}" height="{tall - low:.1f}"/>'
            f'<rect class="right" x="{x - width / 2:.1f}" y="{bottom - low:.1f}" '
            f'width="{width:.1f}" height="{low:.1f}"/>'
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{escape(bar.name)}</text>"
            f'<text class="value" x="{x:.1f}" y="{bottom - tall - 6:.1f}" text-anchor="middle">'
            f"{escape(bar.note)}</text>"
        )
    return _svg(bottom + 24, label, parts)


def columns(values: Sequence[tuple[str, float]], label: str) -> str:
    """One narrow column a problem, 0 to 100 %; hovering names it."""
    left, right, top, bottom = 34, WIDTH - 6, 10, 150
    step = (right - left) / max(1, len(values))
    parts = _grid(left, right, top, bottom)
    for i, (name, score) in enumerate(values):
        y = min(_y(score, top, bottom), bottom - 1.5)  # a sliver, so that 0 is seen to be there
        parts.append(
            f'<rect class="{"right" if score else "wrong"}" x="{left + step * (i + 0.1):.1f}" '
            f'y="{y:.1f}" width="{step * 0.8:.1f}" height="{bottom - y:.1f}">'
            f"<title>{escape(name)}: {100 * score:.0f} %</title></rect>"
        )
    return _svg(bottom + 8, label, parts)


def _grid(left: float, right: float, top: float, bottom: float) -> list[str]:
    return [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{_y(at / 2, top, bottom)}" '
        f'y2="{_y(at / 2, top, bottom)}"/><text class="tick" x="{left - 6}" '
        f'y="{_y(at / 2, top, bottom) + 4}" text-anchor="end">{50 * at}</text>'
        for at in range(3)
    ]


def _y(score: float, top: float, bottom: float) -> float:
    return bottom - score * (bottom - top)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
