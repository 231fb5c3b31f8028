"""docs/results.md is what benchmarks/gsm8k.py draws from the committed result files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_of_results_is_drawn_from_the_result_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("gsm8k", ROOT / "benchmarks/gsm8k.py")
    assert spec is not None and spec.loader is not None
    gsm8k = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gsm8k)
    gsm8k.PAGE = tmp_path / "results.md"
    gsm8k.draw_page()
    drawn = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.*")}
    assert drawn == {path: (ROOT / "docs" / path).read_text() for path in drawn}
    assert len(drawn) > 1
