"""benchmarks/result_file.py: how result files are named, and which commit they tell."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def result_file(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("result_file")


def test_a_result_file_is_named_by_its_device(result_file: ModuleType, tmp_path: Path):
    result = result_file.header("x86_64 CPU", "make", "abc1234") | {"rows": []}
    result_file.save(result, tmp_path / "new", "speed")
    assert json.loads((tmp_path / "new/speed-x86-64-cpu.json").read_text()) == result


def test_the_commit_is_the_one_given_or_unknown_without_a_checkout(
    result_file: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert result_file.header("cpu", "make", "abc1234")["commit"] == "abc1234"
    assert result_file.header("cpu", "make", None)["commit"] == "unknown"
