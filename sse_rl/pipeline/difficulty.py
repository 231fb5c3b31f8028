"""How hard each training prompt is for the model that GRPO starts from, and which are worth asking.

A prompt that is always or never answered right gives its group no advantage. Pass rates are kept in
the run's folder, one line a prompt as its answers come, so that an interrupted measurement goes on;
they also say, before anything is learned, whether there is a signal to learn from. A line names its
prompt by its id and by a hash of its tokens: ids such as `chain_sum-41` return in other data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from sse_eval import statistics

from sse_rl.data.stream import PromptStream
from sse_rl.errors import UserError
from sse_rl.pipeline.folder import write_whole
from sse_rl.pipeline.source import Scores, group_seed, sampling, trajectory
from sse_rl.recipe import Difficulty, Grpo, Rollout
from sse_rl.report.sinks import read_rows
from sse_rl.types import Completion, Group, Prompt, Request

FILE = "difficulty.jsonl"
CHANNEL = "difficulty"
COMPONENT = "accuracy"
POLL_S = 1.0


class PassRate(NamedTuple):
    """A prompt's answers: how many were asked for, and how many were right."""

    samples: int
    right: int


def check(options: Difficulty | None) -> None:
    """Raises UserError if the file that `options` names is not there or not of a measurement."""
    if options is None or options.path is None:
        return
    if not Path(options.path).is_file():
        raise UserError(f"grpo.difficulty.path = {options.path}: no such file")
    read_rates(Path(options.path))


class Pool(Protocol):
    """What is needed of a `RolloutPool`."""

    def submit(self, request: Request) -> None: ...
    def poll(self, channel: str, timeout_s: float) -> list[list[Completion]]: ...
    def cancel(self, channel: str) -> None: ...


@dataclass(slots=True)
class Measurement:
    """Asks prompts and scores their answers; the fields are those of `GroupSource`."""

    pool: Pool
    scorer: Scores
    decode: Callable[[list[int]], str]
    grpo: Grpo
    rollout: Rollout
    seed: int
    interrupted: Callable[[], None] = lambda: None
    progress: Callable[[str], None] = lambda _: None
    say: Callable[[str], None] = lambda _: None

    def worth_asking(
        self, prompts: Sequence[Prompt], options: Difficulty, path: Path, *, may_ask: bool
    ) -> list[Prompt]:
        """The prompts whose pass rate is within the limits of `options`, in the order of dealing.

        What `path` knows, or, before there is one, the file that `options` names, is not measured
        again; the rest is, with the weights that the pool has now. `path` then holds the rates of
        the prompts that are dealt and no others.

        Raises:
            UserError: a prompt is not known and `may_ask` is not set, as training has changed the
                weights since; or no prompt is left.
        """
        stream = PromptStream(prompts, self.seed)
        dealt = [stream[i] for i in range(min(options.limit or len(prompts), len(prompts)))]
        if path.exists() or options.path is None:
            known = _rows_of(dealt, path, without_hash=True)
        else:
            known = _rows_of(dealt, Path(options.path), without_hash=False)
            self.say(
                f"grpo.difficulty.path = {options.path}: it has the pass rates of {len(known)} of "
                f"{len(dealt)} prompts, by id and hash; the others are measured"
            )
        unknown = [prompt.id for prompt in dealt if prompt.id not in known]
        if unknown and not may_ask:
            raise UserError(
                f"{path}: {len(unknown)} prompts are not in it, or under their ids others are; the "
                f"first is {unknown[0]}. The weights that they were to be measured with are gone: "
                "restore it, or start anew"
            )
        write_whole(path, "".join(json.dumps(row) + "\n" for row in known.values()))
        return keep(dealt, self._rates(dealt, options.num_samples, path), options)

    def _rates(self, prompts: Sequence[Prompt], samples: int, path: Path) -> dict[str, PassRate]:
        """The pass rate of each prompt by its id, of so many samples; what `path` holds is not
        asked again.

        What a prompt is answered depends on the weights, the run's seed and its id alone.
        """
        known = read_rates(path)
        asked = {prompt.id: prompt for prompt in prompts if prompt.id not in known}
        for prompt in asked.values():
            name = f"{CHANNEL}/{prompt.id}"
            params = sampling(self.grpo, self.rollout, seed=group_seed(self.seed, name))
            self.pool.submit(Request(name, prompt.token_ids, replace(params, n=samples)))
        try:
            while asked:
                self.interrupted()
                groups = []
                for completions in self.pool.poll(CHANNEL, POLL_S):
                    name = completions[0].request_id.partition("/")[2]
                    answers = [trajectory(completion, self.decode) for completion in completions]
                    groups.append(Group(len(known), asked.pop(name), answers))
                known |= self._score(groups, path)
                self.progress(f"{len(known)}/{len(prompts)} prompts")
        finally:
            self.pool.cancel(CHANNEL)
        return known

    def _score(self, groups: list[Group], path: Path) -> dict[str, PassRate]:
        if not groups:
            return {}
        self.scorer.score(groups)
        rows = []
        for group in groups:
            right = [t.rewards[COMPONENT] == 1 for t in group.trajectories]
            tokens = [len(t.token_ids) for t in group.trajectories]
            row = {"id": group.prompt.id, "prompt": prompt_hash(group.prompt)}
            row |= {"samples": len(right), "right": sum(right)}
            rows.append(row | {"tokens": sum(tokens) / len(tokens)})
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return {row["id"]: PassRate(row["samples"], row["right"]) for row in rows}


def prompt_hash(prompt: Prompt) -> str:
    """Of its token ids, in 16 digits."""
    ids = np.array(prompt.token_ids, dtype="<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]


def read_rates(path: Path) -> dict[str, PassRate]:
    """What was measured so far. Raises UserError if a line is not what a measurement writes."""
    return {row["id"]: PassRate(row["samples"], row["right"]) for row in _checked_rows(path)}


def _rows_of(
    prompts: Sequence[Prompt], path: Path, *, without_hash: bool
) -> dict[str, dict[str, Any]]:
    """The rows of `path` that are of these prompts, by id.

    Files of former versions have no hash; `without_hash` says that their ids are enough.
    """
    wanted = {prompt.id: prompt_hash(prompt) for prompt in prompts}
    found = {}
    for row in _checked_rows(path):
        name, known = row["id"], row.get("prompt")
        if name in wanted and (known == wanted[name] or (known is None and without_hash)):
            found[name] = row
    return found


def _checked_rows(path: Path) -> list[dict[str, Any]]:
    rows = read_rows(path)
    for row in rows:
        if missing := [key for key in ("id", "samples", "right") if key not in row]:
            raise UserError(f"{path}: a row has no {missing[0]!r}; expected id, samples, right")
        name, samples, right = row["id"], row["samples"], row["right"]
        counts = isinstance(samples, int) and isinstance(right, int) and 0 <= right <= samples
        if not (isinstance(name, str) and counts and samples > 0):
            raise UserError(
                f"{path}: id {name!r}, samples {samples!r}, right {right!r}; expected a prompt's "
                "id, a count of at least 1, and how many of them were right"
            )
    return rows


def keep(
    prompts: Sequence[Prompt], rates: dict[str, PassRate], options: Difficulty
) -> list[Prompt]:
    """The prompts whose pass rate is within the limits.

    Raises UserError, naming the shares, if none is.
    """
    low, high = options.min_pass_rate, options.max_pass_rate
    kept = [p for p in prompts if low <= rates[p.id].right / rates[p.id].samples <= high]
    if not kept:
        raise UserError(
            f"grpo.difficulty: no prompt has a pass rate in {low:g}..{high:g}; {told(rates)}. "
            "Widen the limits, or begin with a better base"
        )
    return kept


def told(rates: dict[str, PassRate]) -> str:
    """pass@1 and pass@k over the measured prompts, and the share of them with any signal."""
    samples = min(rate.samples for rate in rates.values())
    found = pass_rates(rates)
    return (
        f"of {len(rates)} prompts, each answered {samples} times: pass@1 {found['pass@1']:.1%}, "
        f"pass@{samples} {found[f'pass@{samples}']:.1%}, both right and wrong {found['mixed']:.1%}"
    )


def pass_rates(rates: dict[str, PassRate]) -> dict[str, float]:
    """{pass@1, pass@k, mixed} where k is the number of samples."""
    samples = min(rate.samples for rate in rates.values())
    scores = [[1.0] * r.right + [0.0] * (r.samples - r.right) for r in rates.values()]
    arrays = [np.array(score) for score in scores]
    mixed = sum(0 < rate.right < rate.samples for rate in rates.values())
    return {
        "pass@1": statistics.average(arrays),
        f"pass@{samples}": statistics.pass_at(arrays, samples),
        "mixed": mixed / len(rates),
    }
