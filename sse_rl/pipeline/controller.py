"""The loop: take a batch, learn from it, publish the weights, log; at times save and evaluate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import ray
import torch

from sse_rl.errors import Interrupted, RunError
from sse_rl.pipeline import cluster
from sse_rl.pipeline.best import kept, offer, restore
from sse_rl.pipeline.checkpoint import atomic_folder, is_complete, prune, saved_steps, step_folder
from sse_rl.pipeline.collapse import collapse
from sse_rl.pipeline.overlap import Beside, BetweenSteps
from sse_rl.pipeline.remarks import WINDOW, remarks
from sse_rl.pipeline.rollouts import RolloutPool
from sse_rl.pipeline.source import GroupSource, TakeStats
from sse_rl.recipe import Recipe
from sse_rl.report.console import RunConsole
from sse_rl.report.sinks import METRICS, Sinks, read_rows
from sse_rl.types import Group

CURSOR_FILE = "cursor.pt"
WAIT_S = 1.0
PUMP_S = 0.05


@dataclass(slots=True)
class Controller:
    recipe: Recipe
    run_dir: Path
    tokenizer: Any
    """Saved with each checkpoint, so that its model/ can be evaluated and exported alone."""
    learner: Any
    pool: RolloutPool
    source: GroupSource
    sinks: Sinks
    console: RunConsole
    evaluations: BetweenSteps | Beside
    """Asked before each step; the scores are logged with the batch that is taken next."""
    interrupted: Callable[[], None]
    """Raises Interrupted once the run was asked to stop."""

    def train(self, start: int) -> None:
        """GRPO steps `start + 1 .. max_steps`, or until the policy collapses, and the evaluation of
        the last weights; those of `start` are published already."""
        grpo, every = self.recipe.grpo, self.recipe.checkpoint.every
        assert grpo is not None
        rows, last = read_rows(self.run_dir / METRICS), grpo.max_steps
        said: set[str] = set()
        for step in range(start + 1, grpo.max_steps + 1):
            cursor = self.source.state_dict()
            if reason := collapse(rows, grpo.early_stop):
                self.console.say(f"stopped after step {step - 1}: {reason}")
                last = step - 1
                self.save(last, cursor)
                break
            try:
                scores = self.evaluations.scores(step - 1)
                self._offer(step - 1, scores)
                began = time.monotonic()
                groups, taken = self.source.take(version=step - 1)
                generated = time.monotonic()
                if grpo.shuffle_rewards:
                    shuffle_rewards(groups, seed=self.recipe.seed, step=step)
                metrics = self._learn(groups)
                learned = time.monotonic()
                publish(self.learner, self.pool, version=step, timeout_s=self._timeout_s)
                published = time.monotonic()
            except Interrupted:
                self.save(step - 1, cursor)
                raise
            metrics |= batch_metrics(groups, taken) | scores
            metrics |= {
                "perf/rollout_s": generated - began,
                "perf/learn_s": learned - generated,
                "perf/publish_s": published - learned,
                "perf/tokens_per_s": metrics["tokens"] / (published - began),
                "perf/worker_restarts": self.pool.restarts,
            }
            rows.append({"step": step, **metrics})
            self.sinks.log(rows[-1], groups)
            self.console.step(step, grpo.max_steps, metrics)
            for kind, text in remarks(rows[-WINDOW:], grpo).items():
                if kind not in said:
                    said.add(kind)
                    self.console.say(f"warning: {text}")
            if step == grpo.max_steps or (every and step % every == 0):
                self.save(step, self.source.state_dict())
        self._offer(last, self.evaluations.finish(last))

    def save(self, step: int, cursor: dict[str, Any]) -> None:
        """Write checkpoints/step-<step>, whole or not at all."""
        target = step_folder(self.run_dir, step)
        if is_complete(target):
            return
        with atomic_folder(target) as folder:
            saved = self.learner.save.remote(str(folder))
            cluster.get(saved, "the learner (saving)", timeout_s=self._timeout_s)
            self.tokenizer.save_pretrained(folder / "model")
            torch.save(cursor, folder / CURSOR_FILE)
        prune(self.run_dir, keep=self.recipe.checkpoint.keep)

    def load(self, step: int) -> None:
        """Go on from checkpoints/step-<step>, which is whole.

        If the best weights were of a later step, those that are left are chosen from anew: the
        base, which the learner holds until now, and the checkpoints.
        """
        if self.recipe.checkpoint.best and kept(self.run_dir) is None:
            savers: dict[int, Callable[[Path], Any]] = {0: self._save_model}
            for saved in saved_steps(self.run_dir):
                savers[saved] = partial(copytree, step_folder(self.run_dir, saved) / "model")
            restore(self.run_dir, read_rows(self.run_dir / METRICS), savers)
        folder = step_folder(self.run_dir, step)
        loaded = self.learner.load.remote(str(folder))
        cluster.get(loaded, f"the learner (loading {folder})", timeout_s=self._timeout_s)
        self.source.load_state_dict(torch.load(folder / CURSOR_FILE, weights_only=False))

    def _offer(self, step: int, scores: dict[str, float]) -> None:
        """Weights that were just evaluated, to be kept if they are the best so far."""
        if self.recipe.checkpoint.best:
            offer(self.run_dir, step, scores, self._save_model)

    def _save_model(self, folder: Path) -> None:
        saved = self.learner.save_model.remote(str(folder))
        cluster.get(saved, "the learner (saving the best)", timeout_s=self._timeout_s)
        self.tokenizer.save_pretrained(folder)

    @property
    def _timeout_s(self) -> float:
        return self.recipe.cluster.learner_timeout_s

    def _learn(self, groups: list[Group]) -> dict[str, Any]:
        call = self.learner.step.remote(groups)
        deadline = time.monotonic() + self._timeout_s
        pause = PUMP_S if self.recipe.grpo and self.recipe.grpo.max_staleness else WAIT_S
        while not ray.wait([call], timeout=pause)[0]:
            self.source.pump()
            if time.monotonic() > deadline:
                raise RunError(
                    f"the learner (in a step): no answer within cluster.learner_timeout_s = "
                    f"{self._timeout_s:g} s"
                )
        return cluster.get(call, "the learner (in a step)")


def publish(learner: Any, pool: RolloutPool, *, version: int, timeout_s: float) -> None:
    """Hand the learner's weights to every rollout worker under a version number."""
    index_ref, buffer_ref = learner.weights.options(num_returns=2).remote(version)
    index = cluster.get(index_ref, "the learner (giving its weights)", timeout_s=timeout_s)
    pool.set_weights(index, buffer_ref)


def shuffle_rewards(groups: list[Group], *, seed: int, step: int) -> None:
    """Permute all rewards of the batch in place, so that they say nothing about the answers."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order = torch.randperm(len(trajectories), generator=generator).tolist()
    rewards = [trajectory.reward for trajectory in trajectories]
    for trajectory, source in zip(trajectories, order, strict=True):
        trajectory.reward = rewards[source]


def batch_metrics(groups: list[Group], taken: TakeStats) -> dict[str, float]:
    """What rewards and refilling say of a batch: each component's mean, each status' share."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    metrics: dict[str, float] = {}
    for name in trajectories[0].rewards:
        known = [v for t in trajectories if (v := t.rewards[name]) is not None]
        metrics[f"rewards/{name}"] = sum(known) / len(known) if known else float("nan")
    statuses = Counter(status for t in trajectories for status in t.statuses.values())
    metrics |= {f"status/{name}": n / len(trajectories) for name, n in sorted(statuses.items())}
    metrics |= {
        "sampling/prompts": taken.prompts,
        "sampling/dropped_stale": taken.dropped_stale,
        "sampling/dropped_no_signal": taken.dropped_no_signal,
        "sampling/kept_no_signal": taken.kept_no_signal,
    }
    return metrics
