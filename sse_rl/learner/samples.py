"""Which trajectories of a batch carry a loss, and with what advantage and weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sse_rl.learner.advantages import group_advantages
from sse_rl.learner.losses import token_scales
from sse_rl.recipe import Grpo
from sse_rl.types import Group, Trajectory


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory with its place in the loss."""

    prompt_token_ids: tuple[int, ...]
    trajectory: Trajectory
    advantage: float
    scale: float
    """See `token_scales`."""

    @property
    def size(self) -> int:
        """Places in a row: the last sampled token is never fed."""
        return len(self.prompt_token_ids) + len(self.trajectory.token_ids) - 1


def weigh(groups: list[Group], grpo: Grpo) -> list[Sample]:
    """The samples of an optimisation batch, in order.

    Left out are trajectories without a reward, and with mask_truncated_completions those that did
    not end by themselves. The latter count in their group's mean reward, and both in the number of
    sequences that a loss is divided by. Raises ValueError for an empty group or batch, and for a
    reward that is not finite.
    """
    if not groups or any(not group.trajectories for group in groups):
        raise ValueError("a batch needs groups, and a group trajectories")
    rewards = [group_rewards(group) for group in groups]
    advantages = group_advantages(rewards, scale_rewards=grpo.scale_rewards)
    kept = [
        (group.prompt, trajectory, advantage)
        for group, values in zip(groups, advantages, strict=True)
        for trajectory, advantage in zip(group.trajectories, values, strict=True)
        if trajectory.reward is not None
        and (trajectory.finish_reason == "stop" or not grpo.mask_truncated_completions)
    ]
    scales = token_scales(
        np.array([len(trajectory.token_ids) for _, trajectory, _ in kept]),
        num_sequences=sum(len(group.trajectories) for group in groups),
        grpo=grpo,
    )
    return [
        Sample(prompt.token_ids, trajectory, float(advantage), float(scale))
        for (prompt, trajectory, advantage), scale in zip(kept, scales, strict=True)
    ]


def group_rewards(group: Group) -> np.ndarray:
    """[G] float64, NaN for a trajectory without a reward."""
    values = [t.reward for t in group.trajectories]
    if any(v is not None and not np.isfinite(v) for v in values):
        raise ValueError(f"group {group.id}: rewards {values} are not all finite")
    return np.array([np.nan if v is None else v for v in values], np.float64)
