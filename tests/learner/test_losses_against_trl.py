"""Losses, advantages and corrections against TRL's own code on the same batch.

TRL's trainer runs its `_generate_and_score_completions` and `_compute_loss`; only its model, its
sampler and its rewards are replaced by tables of numbers.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from trl import GRPOTrainer

from sse_rl.learner.correction import correction_weights
from sse_rl.learner.losses import Tokens, policy_loss
from sse_rl.learner.samples import weigh
from sse_rl.recipe import Grpo
from sse_rl.types import Group, Prompt, Trajectory

END, PAD, PROMPTS, ANSWERS, MAX_LENGTH = 1, 0, 4, 4, 9
TOLERANCE = 1e-6
"""Measured: 4e-8 in a loss, 8e-9 in a gradient whose largest entry is 7e-2."""


class Table:
    """Log-probs of random answers: of the sampler, the learner before and now, the reference."""

    def __init__(self, seed: int, *, holes: bool = False) -> None:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, MAX_LENGTH + 1, PROMPTS * ANSWERS)
        self.ids = [rng.integers(2, 20, n) for n in lengths]
        self.truncated = rng.random(len(lengths)) < 0.3
        for ids, truncated in zip(self.ids, self.truncated, strict=True):
            ids[-1] = 5 if truncated else END
        self.rewards: list[float | None] = list(rng.random(len(lengths)).round(1))
        self.rewards[4:8] = [0.7] * 4
        if holes:
            self.rewards[1] = None
        width = lengths.max()
        self.mask = torch.from_numpy(np.arange(width) < lengths[:, None])
        shape = tuple(self.mask.shape)
        self.sampler = torch.from_numpy(-rng.exponential(1.0, shape)).float()
        near = lambda scale: torch.from_numpy(rng.normal(0, scale, shape)).float()
        self.old = self.sampler + near(0.2)
        self.now = (self.old + near(0.3)).requires_grad_()
        self.reference = self.old + near(0.3)

    def groups(self) -> list[Group]:
        trajectories = [
            Trajectory(
                token_ids=ids.astype(np.int32),
                logprobs=self.sampler[i, : len(ids)].numpy(),
                routing=np.zeros((len(ids), 1, 1), np.uint8),
                versions=np.zeros(len(ids), np.int32),
                finish_reason="length" if self.truncated[i] else "stop",
                reward=self.rewards[i],
            )
            for i, ids in enumerate(self.ids)
        ]
        return [
            Group(g, Prompt(str(g), (7,), ""), trajectories[g * ANSWERS : (g + 1) * ANSWERS])
            for g in range(PROMPTS)
        ]


class Oracle(GRPOTrainer):
    """TRL's trainer over a `Table`, made without its `__init__`."""

    def __init__(self, table: Table, grpo: Grpo, *, mode: str | None) -> None:
        self.table = table
        self.accelerator = Accelerator(cpu=True)
        self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.ref_model = nn.Identity()
        self.environment_factories = self.environments = self.tools = None
        self._tokenizer = SimpleNamespace(pad_token_id=PAD)
        self.pad_to_multiple_of = None
        self.eos_token_ids = [END]
        self.args = SimpleNamespace(
            per_device_train_batch_size=len(table.ids),
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            use_bias_correction_kl=False,
            delta=grpo.delta,
        )
        self.current_gradient_accumulation_steps = 1
        self.num_iterations = grpo.num_iterations
        self.num_generations = ANSWERS
        self.mask_truncated_completions = grpo.mask_truncated_completions
        self.use_vllm = self.vllm_importance_sampling_correction = mode is not None
        self.vllm_importance_sampling_mode = mode
        self.vllm_importance_sampling_clip_min = grpo.correction.clip_min
        self.vllm_importance_sampling_clip_max = grpo.correction.clip_max
        self.multi_objective_aggregation = "sum_then_normalize"
        self.reward_funcs, self.reward_func_names = [None], ["table"]
        self.reward_weights = torch.ones(1)
        self.scale_rewards = grpo.scale_rewards
        self.beta = grpo.beta
        self.loss_type = grpo.loss_type
        self.importance_sampling_level = grpo.importance_sampling_level
        self.epsilon_low = grpo.epsilon
        self.epsilon_high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
        self.max_completion_length = grpo.max_completion_length
        self.top_entropy_quantile = 1.0
        self.off_policy_mask_threshold = None
        self.aux_loss_enabled = self._entropy_bonus_enabled = self.log_multimodal = False
        self._metrics = {"train": defaultdict(list)}
        self._logs = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
        self._pending_extra_logs, self._pending_metrics = {}, {}

    def _generate(self, prompts):
        sampled = [
            row[: len(ids)].tolist()
            for row, ids in zip(self.table.sampler, self.table.ids, strict=True)
        ]
        ids = [row.tolist() for row in self.table.ids]
        return [[7]] * len(ids), ids, None, [""] * len(ids), sampled, {}, None, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return torch.tensor([[torch.nan if r is None else r] for r in self.table.rewards])

    def _get_per_token_logps_and_entropies(self, model, *_, compute_entropy=False, **__):
        if model is self.ref_model:
            return self.table.reference, None, None
        if compute_entropy:
            return self.table.now, torch.zeros_like(self.table.now), None
        return self.table.old, None, None

    def run(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss, its gradient [B, C], and what TRL computed on the way."""
        inputs = self._generate_and_score_completions([{"prompt": "p"}] * len(self.table.ids))
        loss = self._compute_loss(self.model, inputs)
        (gradient,) = torch.autograd.grad(loss, self.table.now)
        return loss, gradient, inputs


def ours(table: Table, grpo: Grpo) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Loss, gradient [B, C], correction weights and advantages, of the same batch."""
    samples = weigh(table.groups(), grpo)
    kept = torch.tensor(
        [
            table.rewards[i] is not None
            and not (grpo.mask_truncated_completions and table.truncated[i])
            for i in range(len(table.ids))
        ]
    )
    mask = table.mask & kept[:, None]
    lengths = table.mask.sum(1)[kept]
    spread = lambda values: torch.tensor(values).repeat_interleave(lengths)
    weights, _ = correction_weights(
        table.old[mask], table.sampler[mask], lengths=lengths, correction=grpo.correction
    )
    tokens = Tokens(
        lengths=lengths,
        advantages=spread([s.advantage for s in samples]),
        scales=spread([s.scale for s in samples]),
        old_logprobs=table.old[mask],
        weights=weights,
        reference_logprobs=table.reference[mask] if grpo.beta else None,
    )
    loss = policy_loss(table.now[mask], tokens, grpo).loss
    (gradient,) = torch.autograd.grad(loss, table.now)
    return loss, gradient, weights, np.array([s.advantage for s in samples])


def settings(**changes: object) -> Grpo:
    plain = {
        "max_steps": 1,
        "max_completion_length": MAX_LENGTH,
        "num_iterations": 2,
        "correction": {"level": "none"},
    }
    return Grpo.model_validate(plain | changes)


CASES = [
    {"loss_type": "grpo"},
    {"loss_type": "dr_grpo"},
    {"loss_type": "dapo"},
    {"loss_type": "bnpo"},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.02},
    {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.1},
    {"epsilon": 0.1, "epsilon_high": 0.28},
    {"delta": 1.4},
    {"beta": 0.05},
    {"beta": 0.05, "loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"beta": 0.05, "loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "grpo", "mask_truncated_completions": True},
    {"loss_type": "dapo", "mask_truncated_completions": True},
    {"loss_type": "dr_grpo", "mask_truncated_completions": True},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"num_iterations": 1},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_the_loss_and_its_gradient_are_trls(case: dict) -> None:
    grpo = settings(**case)
    for seed in range(3):
        table = Table(seed)
        if grpo.num_iterations == 1:
            table.old = table.now.detach()
        expected, gradient, _ = Oracle(table, grpo, mode=None).run()
        loss, own_gradient, _, _ = ours(table, grpo)
        assert abs(loss - expected) <= TOLERANCE
        torch.testing.assert_close(own_gradient, gradient, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bounds", [(None, 1.3), (0.7, 1.3), (0.8, None)])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["mask", "truncate"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_the_correction_is_trls(loss_type: str, mode: str, level: str, bounds: tuple) -> None:
    grpo = settings(
        loss_type=loss_type,
        epsilon_high=1.2,
        beta=0.02,
        correction={"level": level, "mode": mode, "clip_min": bounds[0], "clip_max": bounds[1]},
    )
    table = Table(5)
    expected, gradient, inputs = Oracle(table, grpo, mode=f"{level}_{mode}").run()
    loss, own_gradient, weights, _ = ours(table, grpo)
    ratio = inputs["importance_sampling_ratio"].expand_as(table.mask)[table.mask]
    torch.testing.assert_close(weights, ratio, rtol=0, atol=TOLERANCE)
    assert abs(loss - expected) <= TOLERANCE
    torch.testing.assert_close(own_gradient, gradient, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_are_trls_where_an_answer_has_no_reward(scale_rewards: str) -> None:
    grpo = settings(scale_rewards=scale_rewards)
    table = Table(0, holes=True)
    _, _, inputs = Oracle(table, grpo, mode=None).run()
    kept = [reward is not None for reward in table.rewards]
    own = np.array([s.advantage for s in weigh(table.groups(), grpo)])
    np.testing.assert_allclose(own, inputs["advantages"].numpy()[kept], rtol=1e-5, atol=TOLERANCE)
