"""report.html: what its curves show."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sse_rl.report.curves import BOTTOM, TOP, Curve, draw
from sse_rl.report.html import write_report


def test_an_interval_stands_within_the_axes_and_spans_its_ends():
    drawn = draw([Curve("score", [(0, 0.2), (8, 0.6)], [(0, 0.1, 0.3), (8, 0.5, 0.9)])])
    bars = re.findall(r'y1="([\d.]+)" y2="([\d.]+)"[^>]*opacity="0.35"', drawn)
    assert [tuple(map(float, bar)) for bar in bars] == [
        (BOTTOM, BOTTOM - (BOTTOM - TOP) / 4),
        (BOTTOM - (BOTTOM - TOP) / 2, TOP),
    ]


def test_the_scores_of_a_run_bear_the_intervals_of_its_evaluations(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    rows = [{"step": step, "eval/heldout": 0.1 * step, "eval/step": step - 1} for step in (1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, found in ((0, [0.05, 0.15]), (4, [0.4, 0.7])):
        folder = tmp_path / "eval" / f"heldout-{step}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"ci_bootstrap": found}))
    assert write_report(tmp_path).read_text().count('stroke-width="3"') == 2
