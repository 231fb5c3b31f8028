"""AdamW with a schedule, a clipped gradient and a guard against numbers that are not finite."""

# pyright: reportPrivateImportUsage=false
# torch's foreach functions have private names.

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from sse_rl.recipe import Grpo

MAX_NONFINITE = 5
"""Updates in a row that may be skipped before the run is given up."""
_GATHERED = 2**25
"""Numbers of gradients from which on they are gathered: few launches, and little memory."""


class Update(NamedTuple):
    grad_norm: float
    """Before clipping."""
    nonfinite: bool
    """The update was skipped: loss or gradient was not finite."""


class Optimizer:
    """Optimises the parameters of a model that require a gradient.

    Parameters of less than 32 bits have a float32 copy here that gathers the gradients and takes
    the steps, since an update of 1e-6 vanishes in bfloat16; the model gets the rounded copy.
    """

    def __init__(self, model: nn.Module, grpo: Grpo) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("no parameter of the model requires a gradient")
        self._waiting: dict[nn.Parameter, Tensor] = {}
        """Gradients on their way to float32 copies."""
        self._numbers = 0
        """In them."""
        self._masters = [self._master(p) for p in self._parameters]
        # norms, biases and decay rates are vectors
        matrices = [m for m in self._masters if m.ndim >= 2]
        vectors = [m for m in self._masters if m.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": grpo.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=grpo.learning_rate,
            betas=(grpo.adam_beta1, grpo.adam_beta2),
            eps=grpo.adam_epsilon,
            fused=all(m.is_cuda for m in self._masters),
        )
        self._schedule = get_scheduler(
            grpo.lr_scheduler_type,
            self._adamw,
            num_warmup_steps=grpo.warmup_steps,
            num_training_steps=grpo.max_steps * grpo.num_iterations,
        )
        self._max_grad_norm = grpo.max_grad_norm
        self._skipped = 0

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self._schedule.get_last_lr()[0])

    def update(self, loss: Tensor) -> Update:
        """Step along the gathered gradients and clear them; the schedule moves on in any case.

        A `loss` or a gradient that is not finite leaves weights and moments as they are. Raises
        FloatingPointError the fifth time in a row.
        """
        self._gather()
        norm = nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm)
        finite, grad_norm = torch.stack([(loss + norm).isfinite().to(norm), norm]).tolist()
        if finite:
            self._adamw.step()
            self._skipped = 0
            self._round()
        else:
            self._skipped += 1
        self._adamw.zero_grad(set_to_none=True)
        self.skip()
        if self._skipped == MAX_NONFINITE:
            raise FloatingPointError(
                f"{MAX_NONFINITE} updates in a row had a loss or a gradient that is not finite "
                f"(now loss {float(loss)}, gradient norm {grad_norm}); "
                f"the weights are those from before them"
            )
        return Update(grad_norm, not finite)

    def skip(self) -> None:
        """Move the schedule on without an update."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "adamw": self._adamw.state_dict(),
            "schedule": self._schedule.state_dict(),
            "masters": [master.detach() for _, master in self._copies()],
            "skipped": self._skipped,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume; the model's own weights are loaded already."""
        self._adamw.load_state_dict(state["adamw"])
        self._schedule.load_state_dict(state["schedule"])
        for (_, master), saved in zip(self._copies(), state["masters"], strict=True):
            master.copy_(saved)
        self._skipped = state["skipped"]

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        master = nn.Parameter(parameter.detach().float())

        def wait(source: Tensor) -> None:
            assert source.grad is not None
            if master in self._waiting:
                self._gather()
            self._waiting[master], source.grad = source.grad, None
            self._numbers += master.numel()
            if self._numbers >= _GATHERED:
                self._gather()

        parameter.register_post_accumulate_grad_hook(wait)
        return master

    @torch.no_grad()
    def _gather(self) -> None:
        """Add the gradients that wait to those of their copies: few launches for all of them."""
        if not self._waiting:
            return
        grads = [torch.empty_like(master) for master in self._waiting]
        torch._foreach_copy_(grads, list(self._waiting.values()))
        sums, added = [], []
        for master, grad in zip(self._waiting, grads, strict=True):
            if master.grad is None:
                master.grad = grad
            else:
                sums.append(master.grad)
                added.append(grad)
        if sums:
            torch._foreach_add_(sums, added)
        self._waiting.clear()
        self._numbers = 0

    @torch.no_grad()
    def _round(self) -> None:
        if copies := self._copies():
            torch._foreach_copy_([p for p, _ in copies], [master for _, master in copies])

    def _copies(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The parameters that have a float32 copy, each with it."""
        pairs = zip(self._parameters, self._masters, strict=True)
        return [(parameter, master) for parameter, master in pairs if master is not parameter]
