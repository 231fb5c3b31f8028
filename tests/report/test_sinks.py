"""The files that a run writes a line at a time, and their way back to an earlier step."""

import json
import math

import numpy as np
import pytest

from sse_rl.errors import UserError
from sse_rl.report.sinks import METRICS, SAMPLES, Sinks, cut, read_rows
from sse_rl.types import Group, Prompt, Trajectory


def group(text: str = "4") -> Group:
    trajectory = Trajectory(
        token_ids=np.zeros(1, np.int32),
        logprobs=np.zeros(1, np.float32),
        routing=np.zeros((1, 1, 1), np.uint8),
        versions=np.zeros(1, np.int32),
        finish_reason="stop",
        text=text,
        rewards={"accuracy": math.nan},
    )
    return Group(0, Prompt(id="a", token_ids=(1,), answer="4"), [trajectory])


def test_what_is_no_number_is_null(tmp_path):
    sinks = Sinks(tmp_path, keep=0)
    sinks.log({"step": 1, "reward": math.nan, "loss": math.inf}, [group()])
    sinks.close()
    assert read_rows(tmp_path / METRICS) == [{"step": 1, "reward": None, "loss": None}]
    assert read_rows(tmp_path / SAMPLES)[0]["rewards"] == {"accuracy": None}


def test_a_lone_surrogate_survives_a_resume_and_the_file_stays_utf8(tmp_path):
    sinks = Sinks(tmp_path, keep=0)
    sinks.log({"step": 1}, [group("½ \ud800")])
    sinks.log({"step": 2}, [group("½")])
    sinks.close()
    Sinks(tmp_path, keep=2).close()
    lines = (tmp_path / SAMPLES).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["completion"] for line in lines] == ["½ \ud800", "½"]
    assert "½" in lines[1]


def test_a_resumed_run_keeps_no_line_of_later_steps(tmp_path):
    sinks = Sinks(tmp_path, keep=0)
    for step in (1, 2, 3):
        sinks.log({"step": step, "loss": 0.1}, [group()])
    sinks.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    Sinks(tmp_path, keep=2).close()
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [1, 2]
    assert [row["step"] for row in read_rows(tmp_path / SAMPLES)] == [1, 2]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: damaged"):
        cut(path, 5)
