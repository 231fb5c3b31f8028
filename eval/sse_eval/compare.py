"""Two evaluations of one benchmark side by side: how much better, how sure, and where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sse_eval import statistics
from sse_eval.folder import EvaluationError, Row, differences, read_config, read_rows
from sse_eval.summary import rewards


class Change(NamedTuple):
    """A problem that went from mostly wrong to mostly right, or back."""

    id: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """B against A, over the problems that both have samples of."""

    benchmark: str
    greedy: bool
    """Both answered at temperature 0."""
    problems: int
    unpaired: int
    """Problems that only one of them has samples of; left out."""
    before: float
    """Score of A."""
    after: float
    """Score of B."""
    difference: float
    """B - A."""
    interval: tuple[float, float] | None
    """95 % of the difference, problems resampled in pairs; None for one problem."""
    p_value: float
    """Two-sided, of flipping the sign of each problem's difference."""
    gained: list[Change]
    """Right in less than half of A's samples, and in half or more of B's."""
    lost: list[Change]
    tokens: tuple[float, float]
    """Mean length of an answer in A and B."""
    settings: list[str]
    """What else differs between the two configurations."""
    max_drop: float | None

    @property
    def passes(self) -> bool:
        """Whether B is no more than `max_drop` below A; True without one."""
        return self.max_drop is None or self.difference >= -self.max_drop - 1e-12


def compare(before: Path | str, after: Path | str, *, max_drop: float | None = None) -> Comparison:
    """Compare two evaluation folders, paired by problem.

    A problem's score is its mean over samples, so that the two may have different numbers of them.

    Raises EvaluationError if one is no evaluation's folder, if they are of different benchmarks or
    golds or share no problem; ValueError for a max_drop outside 0..1.
    """
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop must be a share between 0 and 1, not {max_drop}")
    old, new = _load(Path(before)), _load(Path(after))
    names = [side.config["benchmark"]["name"] for side in (old, new)]
    if names[0] != names[1]:
        raise EvaluationError(
            f"{before} is of {names[0]}, {after} of {names[1]}: no common problems"
        )
    ids = [id for id in old.rows if id in new.rows]
    if not ids:
        raise EvaluationError(f"{before} and {after} share no problem that both have samples of")
    for id in ids:
        golds = old.rows[id][0]["answer"], new.rows[id][0]["answer"]
        if golds[0] != golds[1]:
            raise EvaluationError(f"the gold of {id!r} is {golds[0]!r} in A and {golds[1]!r} in B")
    a, b = (np.array([rewards(side.rows[id]).mean() for id in ids]) for side in (old, new))
    changes = [Change(id, float(x), float(y)) for id, x, y in zip(ids, a, b, strict=True)]
    return Comparison(
        benchmark=names[0],
        greedy=all(side.config["sampling"]["temperature"] == 0 for side in (old, new)),
        problems=len(ids),
        unpaired=len(old.rows.keys() ^ new.rows.keys()),
        before=float(a.mean()),
        after=float(b.mean()),
        difference=float((b - a).mean()),
        interval=statistics.difference_interval(b - a),
        p_value=statistics.permutation_p(b - a),
        gained=[change for change in changes if change.before < 0.5 <= change.after],
        lost=[change for change in changes if change.after < 0.5 <= change.before],
        tokens=(_mean_tokens(old.rows, ids), _mean_tokens(new.rows, ids)),
        settings=[
            line for line in differences(old.config, new.config) if not line.startswith("model.")
        ],
        max_drop=max_drop,
    )


def describe(comparison: Comparison) -> str:
    """The comparison in Markdown, the verdict first."""
    c = comparison
    points = lambda score: f"{100 * score:.1f} %"
    low_high = (
        f", 95 % between {100 * c.interval[0]:+.1f} and {100 * c.interval[1]:+.1f}"
        if c.interval
        else ""
    )
    lines = [
        f"**{c.benchmark}{', greedy' * c.greedy}: {points(c.before)} -> {points(c.after)}, "
        f"{100 * c.difference:+.1f} points**{low_high}, p = {c.p_value:.2g} "
        f"({c.problems} problems, paired)",
        "",
        f"- answers of {c.tokens[0]:,.0f} -> {c.tokens[1]:,.0f} tokens",
        f"- gained {len(c.gained)}: {_names(c.gained)}",
        f"- lost {len(c.lost)}: {_names(c.lost)}",
    ]
    if c.unpaired:
        lines.append(f"- left out, since only one has samples of them: {c.unpaired} problems")
    lines += [f"- differs: {line}" for line in c.settings]
    if c.max_drop is not None:
        verdict = "within" if c.passes else "BEYOND"
        lines.append(f"- {verdict} the allowed drop of {100 * c.max_drop:.1f} points")
    return "\n".join(lines) + "\n"


class _Side(NamedTuple):
    config: dict[str, Any]
    rows: Mapping[str, list[Row]]


def _load(path: Path) -> _Side:
    rows: dict[str, list[Row]] = defaultdict(list)
    config = read_config(path)
    for row in read_rows(path / "results.jsonl"):
        rows[row["id"]].append(row)
    return _Side(config, dict(rows))


def _mean_tokens(rows: Mapping[str, list[Row]], ids: list[str]) -> float:
    return float(np.mean([row["tokens"] for id in ids for row in rows[id]]))


def _names(changes: list[Change], most: int = 20) -> str:
    if not changes:
        return "none"
    shown = ", ".join(f"{c.id} ({c.before:.0%} -> {c.after:.0%})" for c in changes[:most])
    return shown + (f" and {len(changes) - most} more" if len(changes) > most else "")
