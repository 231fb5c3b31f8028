"""report.html: what its curves show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sse_rl.errors import UserError
from sse_rl.report.curves import BOTTOM, LEFT, RIGHT, TOP, Curve, draw
from sse_rl.report.html import write_report


def test_an_interval_stands_within_the_axes_and_spans_its_ends():
    drawn = draw([Curve("score", [(0, 0.2), (8, 0.6)], [(0, 0.1, 0.3), (8, 0.5, 0.9)])])
    bars = re.findall(r'y1="([\d.]+)" y2="([\d.]+)"[^>]*opacity="0.35"', drawn)
    assert [tuple(map(float, bar)) for bar in bars] == [
        (BOTTOM, BOTTOM - (BOTTOM - TOP) / 4),
        (BOTTOM - (BOTTOM - TOP) / 2, TOP),
    ]


def evaluation(run: Path, name: str, **summary: object) -> None:
    folder = run / "eval" / name
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_run_s_scores_are_those_of_its_whole_evaluations(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    rows = [{"step": step, "eval/heldout": 0.9} for step in (1, 2)]  # before they were regraded
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation(tmp_path, "heldout-0", avg=0.1, ci_bootstrap=[0.05, 0.15], missing=0)
    evaluation(tmp_path, "heldout-10", avg=0.5, ci_bootstrap=[0.4, 0.7])
    evaluation(tmp_path, "heldout-20", avg=0.9, ci_bootstrap=[0.8, 1.0], missing=13)
    evaluation(tmp_path, "heldout-30", avg=None, ci_bootstrap=None)
    evaluation(tmp_path, "my-set", avg=0.7)
    page = write_report(tmp_path).read_text()
    bars = re.findall(r'<line x1="([\d.]+)" x2="\1"', page)
    assert list(map(float, bars)) == [LEFT, RIGHT]
    assert len(re.findall("<circle", page)) == 2 and ">0.05<" in page and ">0.7<" in page


def test_a_damaged_evaluation_is_named(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    evaluation(tmp_path, "heldout-0")
    (tmp_path / "eval/heldout-0/summary.json").write_text("{")
    with pytest.raises(UserError, match=r"heldout-0.summary\.json: damaged"):
        write_report(tmp_path)
