"""From answers to rewards: the recipe's components, weighted, computed in an actor of their own.

The actor holds the killable grader processes of `sse_rewards`. If it dies itself, it is started
again and asked again: scoring has no state.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
import ray.exceptions

from sse_rl.errors import RunError, UserError
from sse_rl.pipeline.cluster import failure
from sse_rl.recipe import Reward, Rewards
from sse_rl.types import Group

log = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
"""TRL's signature: fn(prompts, completions, completion_ids, **columns), a value a completion."""

GRADED = ("accuracy", "boxed")
"""Components that the grader itself gives."""
ARGLESS = (*GRADED, "think_format")
MAX_RESTARTS = 3


def check_components(components: list[Reward]) -> dict[str, bytes]:
    """The sources of those that are files, by name: what is run is what was checked.

    Raises UserError for a component that cannot be had: unknown, given twice, not importable.
    """
    names, sources = [component.name for component in components], read_sources(components)
    for place, component in enumerate(components):
        if component.name in names[:place]:
            raise UserError(f"rewards.components.{place}: {component.name!r} is there twice")
        if component.name not in GRADED:
            reward_function(component, sources.get(component.name))
        if component.name in ARGLESS and component.args:
            raise UserError(
                f"rewards.components.{place}.args = {component.args}: {component.name} takes none"
            )
    return sources


def read_sources(components: list[Reward]) -> dict[str, bytes]:
    """The content of each component that is `FILE.py:function`, by its name: an actor on another
    machine may have no such file. Raises UserError naming a file that cannot be read."""
    sources = {}
    for component in components:
        if component.file is None:
            continue
        try:
            sources[component.name] = Path(component.file).read_bytes()
        except OSError as error:
            raise UserError(
                f"rewards.components: {component.name!r}: {component.file} cannot be read: {error}"
            ) from None
    return sources


@dataclass(slots=True)
class Sample:
    """One answer to be scored."""

    prompt: str
    completion: str
    token_ids: list[int]
    answer: str
    kind: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Score:
    reward: float | None
    """The weighted sum; None where the accuracy check abstains, which masks the sample."""
    rewards: dict[str, float | None]
    statuses: dict[str, str]


class RewardWorker:
    """The Ray actor that scores batches of samples."""

    def __init__(self, rewards: Rewards, sources: Mapping[str, bytes]) -> None:
        from sse_rewards import RewardPool

        self._rewards = rewards
        self._pool = RewardPool(workers=rewards.num_workers, time_limit=rewards.time_limit_s)
        self._functions = {
            reward.name: reward_function(reward, sources.get(reward.name))
            for reward in rewards.components
            if reward.name not in GRADED
        }

    def score(self, samples: list[Sample]) -> list[Score]:
        graded = self._pool.score_batch(
            [(sample.completion, sample.answer, sample.kind) for sample in samples],
            deadline=self._rewards.batch_timeout_s,
        )
        columns: dict[str, list[float | None]] = {}
        for component in self._rewards.components:
            if component.name == "accuracy":
                columns["accuracy"] = [result.reward for result in graded]
            elif component.name == "boxed":
                columns["boxed"] = [float(result.extracted is not None) for result in graded]
            else:
                function = self._functions[component.name]
                columns[component.name] = call(component.name, function, samples)
        scores = []
        for row, result in enumerate(graded):
            values = {name: column[row] for name, column in columns.items()}
            scores.append(
                Score(
                    combine(values, self._rewards.components), values, {"accuracy": result.status}
                )
            )
        return scores


class Scorer:
    """Asks the reward actor, and starts a new one when it dies or stays silent."""

    def __init__(self, spawn: Callable[[], Any], *, timeout_s: float) -> None:
        self._spawn = spawn
        self._timeout_s = timeout_s
        self._actor = spawn()

    def score(self, groups: list[Group]) -> None:
        """Write reward, rewards and statuses into every trajectory of `groups`."""
        trajectories = [(g.prompt, t) for g in groups for t in g.trajectories]
        samples = [
            Sample(p.text, t.text, t.token_ids.tolist(), p.answer, p.kind, p.columns)
            for p, t in trajectories
        ]
        for (_, trajectory), score in zip(trajectories, self._ask(samples), strict=True):
            trajectory.reward = score.reward
            trajectory.rewards = score.rewards
            trajectory.statuses = score.statuses

    def close(self) -> None:
        ray.kill(self._actor)

    def _ask(self, samples: list[Sample]) -> list[Score]:
        last: Exception | None = None
        for attempt in range(MAX_RESTARTS + 1):
            try:
                return ray.get(self._actor.score.remote(samples), timeout=self._timeout_s)
            except ray.exceptions.RayTaskError as error:
                raise failure(error, "the reward actor") from None
            except ray.exceptions.RayError as error:
                if getattr(error, "actor_init_failed", False):  # the next one would fail as well
                    raise RunError(f"the reward actor could not start: {error}") from None
                log.warning("the reward actor died or is silent (%s): starting another", error)
                last = error
                ray.kill(self._actor)
                if attempt < MAX_RESTARTS:
                    self._actor = self._spawn()
        raise RunError(
            f"the reward actor failed {MAX_RESTARTS + 1} times on a batch of {len(samples)} "
            f"samples (limit {self._timeout_s:g} s each); the last time: {last}"
        )


def combine(values: dict[str, float | None], components: list[Reward]) -> float | None:
    """The weighted sum of what is not None; None if the accuracy check, or everything, abstains."""
    present = [(c.weight, v) for c in components if (v := values[c.name]) is not None]
    if not present or ("accuracy" in values and values["accuracy"] is None):
        return None
    return float(sum(weight * value for weight, value in present))


def reward_function(reward: Reward, source: bytes | None = None) -> RewardFunction:
    """TRL's overlong, repetition and think-format rewards by name, `package.module:function`, or
    `FILE.py:function` of a file whose content is `source`.

    Raises UserError naming the component if there is no such function.
    """
    if ":" in reward.name:
        place, _, name = reward.name.rpartition(":")
        try:
            module = importlib.import_module(place) if source is None else _module(place, source)
            function = getattr(module, name)
        except Exception as error:  # a module of the user's may raise anything
            raise UserError(
                f"rewards.components: {reward.name!r} cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from None
        if not callable(function):
            raise UserError(f"rewards.components: {reward.name!r} is no function")
        _check_arguments(function, reward)
        return lambda **columns: function(**columns, **reward.args)
    from trl import rewards

    named: dict[str, Callable[[], RewardFunction]] = {
        "think_format": lambda: rewards.think_format_reward,  # pyright: ignore[reportPrivateImportUsage]
        "soft_overlong": lambda: rewards.get_soft_overlong_punishment(**reward.args),  # pyright: ignore[reportPrivateImportUsage]
        "repetition": lambda: rewards.get_repetition_penalty_reward(**reward.args),  # pyright: ignore[reportPrivateImportUsage]
    }
    if reward.name not in named:
        known = ", ".join(["accuracy", "boxed", *named])
        raise UserError(
            f"rewards.components: unknown reward {reward.name!r}; known are {known}, "
            "package.module:function, or FILE.py:function"
        )
    try:
        return named[reward.name]()
    except TypeError as error:
        raise UserError(f"rewards.components: {reward.name}: args {reward.args}: {error}") from None


@cache
def _module(file: str, source: bytes) -> ModuleType:
    """The module that `source` defines, known to `sys.modules` as a dataclass in it needs it."""
    module = sys.modules[file] = ModuleType(file)
    module.__file__ = file
    exec(compile(source, file, "exec", dont_inherit=True), vars(module))
    return module


def _check_arguments(function: RewardFunction, reward: Reward) -> None:
    given = dict.fromkeys(("prompts", "completions", "completion_ids", "solution")) | reward.args
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise UserError(
            f"rewards.components: {reward.name} is called with {', '.join(given)} and the "
            f"dataset's columns: {error}"
        ) from None


def call(name: str, function: RewardFunction, samples: list[Sample]) -> list[float | None]:
    """One reward function over all samples, with the dataset's columns that every row has.

    Raises UserError naming the component if it raises, or gives anything but a number or None for
    each sample.
    """
    shared = set.intersection(*(set(sample.columns) for sample in samples)) if samples else set()
    reserved = {"prompts", "completions", "completion_ids", "solution"}
    columns = {name: [s.columns[name] for s in samples] for name in sorted(shared - reserved)}
    try:
        values = function(
            prompts=[sample.prompt for sample in samples],
            completions=[[{"role": "assistant", "content": s.completion}] for s in samples],
            completion_ids=[sample.token_ids for sample in samples],
            solution=[sample.answer for sample in samples],
            **columns,
        )
        numbers = [None if value is None else float(value) for value in values]
    except Exception as error:  # a function of the user's may raise anything
        raise UserError(
            f"rewards.components: {name} raised {type(error).__name__}: {error}"
        ) from error
    if len(numbers) != len(samples):
        raise UserError(
            f"rewards.components: {name} gave {len(numbers)} values for {len(samples)} completions"
        )
    for number, sample in zip(numbers, samples, strict=True):
        if number is not None and not math.isfinite(number):
            raise UserError(
                f"rewards.components: {name} gave {number} for {sample.completion!r:.200}"
            )
    return numbers
