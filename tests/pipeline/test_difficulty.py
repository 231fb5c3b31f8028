"""Prompts of known difficulty: measured once, kept in a file, filtered by their pass rate."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sse_rl.errors import Interrupted, UserError
from sse_rl.pipeline.difficulty import Measurement, check, pass_rates, prompt_hash, read_rates
from sse_rl.pipeline.summary import difficulty
from sse_rl.recipe import Difficulty, Grpo, Rollout
from sse_rl.report.sinks import read_rows
from sse_rl.types import Completion, Group, Prompt, Request

RIGHT = {"never": 0, "seldom": 1, "often": 3, "always": 4}
PROMPTS = [Prompt(name, (1, 2), answer="7") for name in RIGHT]


class Pool:
    """Answers each request at once; sample i of a prompt is right for i below RIGHT."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.queue: deque[Request] = deque()
        self.asked: list[Request] = []
        self.stop_after = stop_after

    def submit(self, request: Request) -> None:
        self.queue.append(request)

    def poll(self, channel: str, timeout_s: float) -> list[list[Completion]]:
        if len(self.asked) == self.stop_after:
            raise Interrupted
        request = self.queue.popleft()
        self.asked.append(request)
        right = RIGHT[request.request_id.partition("/")[2]]
        return [[completion(request, i, i < right) for i in range(request.params.n)]]

    def cancel(self, channel: str) -> None:
        self.queue.clear()


class Scorer:
    def score(self, groups: list[Group]) -> None:
        for group in groups:
            for answer in group.trajectories:
                answer.rewards["accuracy"] = float(answer.text == group.prompt.answer)


def completion(request: Request, index: int, right: bool) -> Completion:
    zeros = np.zeros(1, np.float32)
    tokens = np.array([7 if right else 8], np.int32)
    routing = np.zeros((2, 1, 1), np.uint8)
    return Completion(request.request_id, index, tokens, zeros, routing, tokens * 0, "stop")


def measurement(pool: Pool) -> Measurement:
    grpo = Grpo(max_steps=1, num_generations=2)
    return Measurement(pool, Scorer(), lambda ids: str(ids[0]), grpo, Rollout(), seed=0)


def rows(prompts: list[Prompt] = PROMPTS) -> list[dict]:
    """What a measurement of `prompts` writes."""
    return [
        {"id": p.id, "prompt": prompt_hash(p), "samples": 4, "right": RIGHT.get(p.id, 2)}
        for p in prompts
    ]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def names(prompts: list[Prompt]) -> set[str]:
    return {prompt.id for prompt in prompts}


def test_prompts_too_hard_or_too_easy_are_left_out(tmp_path: Path):
    options = Difficulty(num_samples=4, min_pass_rate=0.1, max_pass_rate=0.8)
    pool, path = Pool(), tmp_path / "difficulty.jsonl"
    kept = measurement(pool).worth_asking(PROMPTS, options, path, may_ask=True)
    assert names(kept) == {"seldom", "often"}
    assert {name: rate.right for name, rate in read_rates(path).items()} == RIGHT
    assert all(request.params.n == 4 for request in pool.asked)
    assert len({request.params.seed for request in pool.asked}) == len(PROMPTS)


def test_an_interrupted_measurement_asks_only_what_is_missing(tmp_path: Path):
    options, path = Difficulty(num_samples=4), tmp_path / "difficulty.jsonl"
    first = Pool(stop_after=2)
    with pytest.raises(Interrupted):
        measurement(first).worth_asking(PROMPTS, options, path, may_ask=True)
    with path.open("a") as file:
        file.write('{"id": "alw')  # as a kill may leave it
    second = Pool()
    kept = measurement(second).worth_asking(PROMPTS, options, path, may_ask=True)
    assert len(second.asked) == 2 and names(kept) == {"seldom", "often"}
    assert len(path.read_text().splitlines()) == len(PROMPTS)
    fresh = measurement(Pool()).worth_asking(PROMPTS, options, tmp_path / "other", may_ask=True)
    assert kept == fresh


def test_another_runs_file_is_not_measured_again(tmp_path: Path):
    path, other = tmp_path / "difficulty.jsonl", tmp_path / "other.jsonl"
    write(other, rows())
    pool = Pool()
    options = Difficulty(path=str(other), min_pass_rate=0.5)
    kept = measurement(pool).worth_asking(PROMPTS, options, path, may_ask=True)
    assert names(kept) == {"often"} and not pool.asked


def test_rates_of_other_prompts_under_the_same_ids_are_measured_again(tmp_path: Path):
    path, other = tmp_path / "difficulty.jsonl", tmp_path / "other.jsonl"
    others = [replace(prompt, token_ids=(1, 3)) for prompt in PROMPTS]
    options = Difficulty(path=str(other), num_samples=4)
    unnamed = [{k: v for k, v in row.items() if k != "prompt"} for row in rows()]
    for known in (rows(others), unnamed):
        pool, said = Pool(), []
        write(other, known)
        subject = replace(measurement(pool), say=said.append)
        with pytest.raises(UserError, match="4 prompts are not in it"):
            subject.worth_asking(PROMPTS, options, path, may_ask=False)
        assert not path.exists()
        kept = subject.worth_asking(PROMPTS, options, path, may_ask=True)
        assert names(kept) == {"seldom", "often"} and len(pool.asked) == 4
        assert "it has the pass rates of 0 of 4 prompts" in said[-1]
        assert [row["prompt"] for row in read_rows(path)] == [prompt_hash(PROMPTS[0])] * 4
        path.unlink()


def test_a_runs_own_rates_of_a_former_version_are_kept(tmp_path: Path):
    path = tmp_path / "difficulty.jsonl"
    write(path, [{"id": name, "samples": 4, "right": n} for name, n in RIGHT.items()])
    for may_ask in (False, True):
        pool = Pool()
        kept = measurement(pool).worth_asking(PROMPTS, Difficulty(), path, may_ask=may_ask)
        assert names(kept) == {"seldom", "often"} and not pool.asked


def test_only_prompts_that_are_dealt_are_counted(tmp_path: Path):
    path, other = tmp_path / "difficulty.jsonl", tmp_path / "other.jsonl"
    write(other, rows([*PROMPTS, Prompt("elsewhere", (5,), answer="7")]))
    shown: list[str] = []
    subject = replace(measurement(Pool()), progress=shown.append)
    unlike = [*PROMPTS[:3], replace(PROMPTS[3], token_ids=(9,))]
    subject.worth_asking(unlike, Difficulty(path=str(other), num_samples=4), path, may_ask=True)
    assert shown == ["4/4 prompts"]
    told = difficulty(tmp_path)
    assert told and told["prompts"] == 4 and told["pass@1"] == 0.5
    write(path, rows([*PROMPTS, Prompt("elsewhere", (5,), answer="7")]))
    subject.worth_asking(PROMPTS, Difficulty(), path, may_ask=False)
    told = difficulty(tmp_path)
    assert told and told["prompts"] == 4


def test_what_training_has_changed_since_is_not_measured(tmp_path: Path):
    with pytest.raises(UserError, match="4 prompts are not in it"):
        measurement(Pool()).worth_asking(PROMPTS, Difficulty(), tmp_path / "f", may_ask=False)


def test_no_prompt_left_names_the_pass_rates(tmp_path: Path):
    options = Difficulty(num_samples=4, min_pass_rate=0.3, max_pass_rate=0.4)
    with pytest.raises(UserError, match=r"pass@1 50\.0%, pass@4 75\.0%, .* wrong 50\.0%"):
        measurement(Pool()).worth_asking(PROMPTS, options, tmp_path / "f", may_ask=True)


def test_a_limit_measures_the_prompts_that_would_be_dealt_first(tmp_path: Path):
    options, pool = Difficulty(limit=3, min_pass_rate=0, max_pass_rate=1), Pool()
    kept = measurement(pool).worth_asking(PROMPTS, options, tmp_path / "f", may_ask=True)
    assert len(kept) == len(pool.asked) == 3


def test_pass_rates_are_unbiased_and_count_mixed_groups():
    from sse_rl.pipeline.difficulty import PassRate

    rates = {"a": PassRate(8, 0), "b": PassRate(8, 2), "c": PassRate(8, 8)}
    assert pass_rates(rates) == pytest.approx(
        {"pass@1": (0 + 0.25 + 1) / 3, "pass@8": 2 / 3, "mixed": 1 / 3}
    )


def test_a_file_that_is_not_there_or_of_something_else_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"grpo\.difficulty\.path = gone: no such file"):
        check(Difficulty(path="gone"))
    (tmp_path / "f").write_text('{"id": "a", "reward": 1}\n')
    with pytest.raises(UserError, match="a row has no 'samples'"):
        check(Difficulty(path=str(tmp_path / "f")))


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a", "samples": 0, "right": 0},
        {"id": "a", "samples": 4, "right": 5},
        {"id": "a", "samples": 4, "right": None},
        {"id": ["a"], "samples": 4, "right": 1},
    ],
)
def test_a_row_that_is_no_count_is_refused(tmp_path: Path, row: dict):
    (tmp_path / "f").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"f: id .*, samples .*, right .*; expected a prompt's id"):
        check(Difficulty(path=str(tmp_path / "f")))
