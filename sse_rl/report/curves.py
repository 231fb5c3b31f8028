"""Line charts as inline SVG: readable on a phone, no script, no network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sse_rl.report.scores import Scored

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 40, 310, 8, 126
SMOOTH_ABOVE = 40
COLOURS = ("var(--a)", "var(--b)")


@dataclass(frozen=True, slots=True)
class Curve:
    label: str
    points: Sequence[tuple[float, float]]
    """(step, value)."""
    intervals: Sequence[tuple[float, float, float]] = ()
    """(step, low, high)."""


def metric_curve(key: str, rows: Sequence[Mapping[str, Any]], scores: Iterable[Scored]) -> Curve:
    """A metric of the steps; of `eval/<protocol>` the scores, and where other problems of the kind
    might take them."""
    if not key.startswith("eval/"):
        return Curve(key, [(row["step"], row[key]) for row in rows if row.get(key) is not None])
    found = sorted((s.step, s.summary) for s in scores if f"eval/{s.protocol}" == key)
    bars = [(step, *s["ci_bootstrap"]) for step, s in found if s.get("ci_bootstrap")]
    return Curve(key, [(step, s["avg"]) for step, s in found], bars)


def draw(curves: Sequence[Curve], *, named: bool = False) -> str:
    """An SVG of all curves on one pair of axes; long noisy ones get a running mean on top.

    Several curves bear their labels; one alone only if it is to be `named`.
    """
    points = [point for curve in curves for point in curve.points]
    points += [(x, y) for curve in curves for x, *ends in curve.intervals for y in ends]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = _range([y for _, y in points])
    at_x = lambda x: LEFT + (RIGHT - LEFT) * (x - low_x) / ((high_x - low_x) or 1)
    at_y = lambda y: BOTTOM - (BOTTOM - TOP) * (y - low_y) / (high_y - low_y)
    parts = []
    for value in (low_y, (low_y + high_y) / 2, high_y):
        y = at_y(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    for x, anchor in ((low_x, "start"), (high_x, "end")):
        parts.append(f'<text x="{at_x(x):.1f}" y="140" text-anchor="{anchor}">{x:g}</text>')
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        noisy = len(curve.points) > SMOOTH_ABOVE
        parts += [
            f'<line x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{at_y(low):.1f}" '
            f'y2="{at_y(high):.1f}" stroke="{colour}" stroke-width="3" opacity="0.35"/>'
            for x, low, high in curve.intervals
        ]
        parts.append(_line(curve.points, at_x, at_y, colour, 0.35 if noisy else 1.0))
        if noisy:
            parts.append(_line(running_mean(curve.points), at_x, at_y, colour, 1.0))
        if named or len(curves) > 1:
            parts.append(
                f'<text x="{LEFT + 8 + 140 * number}" y="149" fill="{colour}">'
                f"{escape(curve.label)}</text>"
            )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 4}" role="img" font-size="9" fill="var(--dim)">'
        f"{''.join(parts)}</svg>"
    )


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value averaged with the tenth of the curve before it."""
    width = max(1, len(points) // 10)
    smooth = []
    for end in range(1, len(points) + 1):
        window = [y for _, y in points[max(0, end - width) : end]]
        smooth.append((points[end - 1][0], sum(window) / len(window)))
    return smooth


def _line(points, at_x, at_y, colour: str, opacity: float) -> str:
    path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
    dots = "".join(
        f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.5" fill="{colour}"/>'
        for x, y in points
    )
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" '
        f'opacity="{opacity}"/>' + (dots if len(points) <= 12 else "")
    )


def _short(value: float) -> str:
    text = f"{value:.3g}"
    return text if len(text) <= 6 else f"{value:.0e}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if math.isclose(low, high):
        return low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    return low, high
