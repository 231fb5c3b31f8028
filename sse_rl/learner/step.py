"""The learner: groups of scored trajectories in, one optimisation step and its metrics out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sse_kernels import select_rows, take_rows
from torch import Tensor, nn

from sse_rl.learner.correction import correction_weights
from sse_rl.learner.losses import Tokens, policy_loss
from sse_rl.learner.metrics import Tally, trajectory_metrics
from sse_rl.learner.optimizer import Optimizer, Update
from sse_rl.learner.packing import pack
from sse_rl.learner.rescore import rescore
from sse_rl.learner.routing import balance_loss, flips, partition_shares
from sse_rl.learner.samples import weigh
from sse_rl.model.cache import PackedInputs
from sse_rl.model.fork import fork_inputs
from sse_rl.model.modeling import PackedOutput, SSEForCausalLM
from sse_rl.recipe import Grpo
from sse_rl.types import Group, PackedBatch


class Learner:
    """Trains `model` in place by GRPO; knows nothing of where groups come from or weights go."""

    def __init__(
        self,
        model: SSEForCausalLM,
        grpo: Grpo,
        *,
        reference: SSEForCausalLM | None = None,
        device: torch.device | str = "cpu",
        page_size: int = 64,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`reference` is the frozen model that `grpo.beta` > 0 needs; the KL to it is a metric.

        `page_size` and `state_dtype` are the rollout engine's, for `grpo.exact_logprobs`.
        """
        if grpo.beta > 0 and reference is None:
            raise ValueError(f"beta = {grpo.beta} needs a reference model")
        self.device = torch.device(device)
        self.grpo = grpo
        self._engine_form = {"page_size": page_size, "state_dtype": state_dtype}
        nn.Module.to(model, self.device)
        self.model = model.train()
        if grpo.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.reference = reference
        if reference is not None:
            nn.Module.to(reference, self.device)
            reference.eval().requires_grad_(False)
        self.optimizer = Optimizer(self.model, grpo)
        own = self.model.config.aux_loss_coef
        self._aux_coef = own if grpo.router_aux_loss_coef is None else grpo.router_aux_loss_coef

    def step(self, groups: list[Group]) -> dict[str, float]:
        """`num_iterations` updates on the whole batch of `groups`; returns the step's metrics.

        A metric is a mean over the updates and, where it is a token's, over sampled tokens; those
        that compare rollout and learner are from before the first update. A trajectory without a
        reward, or truncated under mask_truncated_completions, is left out of every row; a batch of
        nothing else makes no update.

        Raises ValueError for an empty or malformed group, FloatingPointError after five updates in
        a row whose loss or gradient was not finite.
        """
        samples = weigh(groups, self.grpo)
        batches = pack(
            samples,
            max_tokens=self.grpo.max_tokens_per_micro_batch,
            share_prompts=self.grpo.share_prompts,
        )
        return {
            "learning_rate": self.optimizer.learning_rate,
            **trajectory_metrics(groups),
            **self._optimise(batches),
            "tokens": float(sum(len(b.input_ids) for b in batches)),
            "num_micro_batches": float(len(batches)),
        }

    def weights(self) -> dict[str, Tensor]:
        """The policy's tensors by name; not copies, so the next step changes them."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed learner needs to go on bit for bit; its tensors are not copies."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "model": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RuntimeError if the weights do not fit; tied tensors may come under one name."""
        result = self.model.load_state_dict(state["model"], strict=False)
        own = self.model.state_dict()
        loaded = {own[name].data_ptr() for name in state["model"] if name in own}
        missing = [name for name in result.missing_keys if own[name].data_ptr() not in loaded]
        if missing or result.unexpected_keys:
            raise RuntimeError(
                f"the saved weights do not fit the model: missing {missing}, "
                f"unexpected {result.unexpected_keys}"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def _optimise(self, batches: list[PackedBatch]) -> dict[str, float]:
        """`num_iterations` updates on the micro-batches of one optimisation batch."""
        shares = partition_shares(
            [b.routing for b in batches],
            [b.readers for b in batches],
            num_partitions=self.model.config.num_sparse_partition,
        )
        balance = _Balance(
            torch.from_numpy(shares).to(self.device), sum(b.num_tokens for b in batches)
        )
        look_back = self.model.config.conv_size - 1
        replay = self.grpo.routing_replay
        rows = [_Row(b, self.device, look_back, replay=replay) for b in batches]
        tally = Tally()
        updates: list[Update] = []
        for _ in range(self.grpo.num_iterations):
            if not rows:
                self.optimizer.skip()
                continue
            losses = [self._backward(row, balance, tally, 1 / len(rows)) for row in rows]
            updates.append(self.optimizer.update(torch.stack(losses).sum()))
        return {
            "loss": 0.0,
            **tally.read(),
            "grad_norm": sum(u.grad_norm for u in updates) / max(len(updates), 1),
            "nonfinite": float(sum(u.nonfinite for u in updates)),
        }

    def _backward(self, row: _Row, balance: _Balance, tally: Tally, part: float) -> Tensor:
        """Add the gradient of a micro-batch, `part` of an update, to the model's; its loss."""
        out = self.model.packed(row.input_ids, row.inputs)
        logprobs, entropy = self._logprobs(self.model, out, row)
        if self.grpo.exact_logprobs:
            exact = rescore(
                self.model,
                row.batch,
                temperature=self.grpo.temperature,
                replay=self.grpo.routing_replay,
                **self._engine_form,
            )
            logprobs = _Valued.apply(logprobs, exact)
        if row.old is None:
            self._compare(row, logprobs.detach(), out, tally)
        assert row.old is not None and row.weights is not None
        tokens = Tokens(
            lengths=row.lengths,
            advantages=row.advantages,
            scales=row.scales,
            old_logprobs=row.old,
            weights=row.weights,
            reference_logprobs=row.reference,
        )
        policy = policy_loss(logprobs, tokens, self.grpo)
        aux = balance_loss(
            out.router_probs,
            row.routing,
            row.readers,
            shares=balance.shares,
            num_tokens=balance.num_tokens,
        )
        loss = policy.loss + self._aux_coef * aux
        loss.backward()

        tally.mean({"loss": loss, "policy_loss": policy.loss, "aux_loss": aux}, count=part)
        token_sums = {
            "entropy": entropy.sum(),
            "clip_ratio": policy.clipped_low + policy.clipped_high,
            "clip_ratio/low": policy.clipped_low,
            "clip_ratio/high": policy.clipped_high,
        }
        if policy.kl is not None:
            token_sums["kl"] = policy.kl
        tally.mean(token_sums, count=len(row.targets))
        return loss.detach()

    def _compare(self, row: _Row, old: Tensor, out: PackedOutput, tally: Tally) -> None:
        """Before the first update: set the row's constants, and measure the gap to the rollout."""
        row.old = old
        row.weights, ratio = correction_weights(
            old, row.rollout, lengths=row.lengths, correction=self.grpo.correction
        )
        if self.reference is not None:
            with torch.no_grad():
                hidden = self.reference.packed(row.input_ids, row.inputs)
                row.reference, _ = self._logprobs(self.reference, hidden, row)
        gap = (old - row.rollout).double()
        corrected = row.weights != (ratio if self.grpo.correction.level != "none" else 1)
        tally.mean(
            {
                "rollout_kl": (gap.expm1() - gap).sum(),
                "rollout_logprob_diff_mean": gap.abs().sum(),
                "importance_ratio/mean": ratio.sum(),
                "correction_share": corrected.sum(),
            },
            count=len(old),
        )
        tally.max(
            {"rollout_logprob_diff_max": gap.abs().max(), "importance_ratio/max": ratio.max()}
        )
        if out.router_probs:
            choices = row.batch.num_tokens * row.routing.shape[1]
            found = flips(out.router_probs, row.routing, row.readers)
            tally.mean({"flip_rate": found}, count=choices)

    def _logprobs(
        self, model: SSEForCausalLM, out: PackedOutput, row: _Row
    ) -> tuple[Tensor, Tensor]:
        hidden = take_rows(out.hidden, row.predicting)
        return model.logprobs(hidden, row.targets, temperature=self.grpo.temperature)


class _Valued(torch.autograd.Function):
    """`value` with the gradient of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@dataclass(frozen=True, slots=True)
class _Balance:
    """What the load-balance loss needs of the whole optimisation batch."""

    shares: Tensor
    """[L_sse, N]."""
    num_tokens: int


class _Row:
    """A micro-batch on the learner's device."""

    def __init__(
        self, batch: PackedBatch, device: torch.device, look_back: int, *, replay: bool
    ) -> None:
        def load(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.batch = batch
        sequence = batch.sequence
        self.input_ids = load(batch.input_ids)
        self.routing = load(batch.routing)
        self.predicting = select_rows(load(batch.predicting), len(batch.input_ids))
        self.readers = None if batch.readers is None else load(batch.readers)
        self.targets = load(batch.targets)
        self.lengths = load(batch.lengths)
        self.advantages = load(batch.advantages[sequence])
        self.scales = load(batch.scales[sequence])
        self.rollout = load(batch.logprobs)
        pieces = np.diff(batch.cu_seqlens).tolist()
        fork = None
        if batch.parent is not None:
            prompts = len(pieces) - len(batch.parent)
            fork = fork_inputs(
                pieces[:prompts],
                pieces[prompts:],
                batch.parent.tolist(),
                look_back=look_back,
                device=device,
            )
        self.inputs = PackedInputs(
            cu_seqlens=load(batch.cu_seqlens),
            positions=load(batch.positions),
            max_seqlen=max(pieces),
            replay=self.routing if replay else None,
            fork=fork,
        )
        self.old: Tensor | None = None
        """[M] log-probs of the learner before the first update, and the correction's weights."""
        self.weights: Tensor | None = None
        self.reference: Tensor | None = None
