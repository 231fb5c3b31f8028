"""The console: what it prints where there is no terminal, and that no number breaks it."""

import io
import math

from rich.console import Console

from sse_rl.report import console as module
from sse_rl.report.console import RunConsole, sparkline


def plain(monkeypatch) -> tuple[RunConsole, io.StringIO]:
    monkeypatch.setattr(module, "PLAIN_EVERY_S", -1.0)
    out = io.StringIO()
    return RunConsole("run", Console(file=out, width=40)), out


def test_a_stage_is_printed_again_only_when_it_has_moved(monkeypatch):
    console, out = plain(monkeypatch)
    for progress in ("step 50", "step 50", "step 100"):
        console.stage("sft", progress)
    assert out.getvalue().splitlines() == ["sft step 50", "sft step 100"]


def test_a_long_line_is_not_wrapped(monkeypatch):
    console, out = plain(monkeypatch)
    console.step(1, 2, {"reward": 0.5})
    assert len(out.getvalue().splitlines()) == 1


def test_a_terminal_draws_a_step_without_a_reward():
    out = io.StringIO()
    with RunConsole("run", Console(file=out, force_terminal=True)) as console:
        console.step(1, 2, {"reward": math.nan})
        console.step(2, 2, {"reward": 1.0})
        console.stage("eval heldout", "3/8")


def test_a_sparkline_leaves_out_what_is_no_number():
    assert sparkline([0.0, math.nan, 1.0], width=8) == "▁ █"
    assert sparkline([math.nan], width=8) == " "
