"""One random problem for both operators, and how far two of their forms are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import sse_kernels
import torch
from torch import Tensor

Form = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Case:
    """Leaf tensors of `sse_gla` or `sse_gdn` in the order of their arguments, and their routing."""

    variant: str
    tokens: dict[str, Tensor]
    """Everything with an axis T, router logits included."""
    initial_state: Tensor | None
    cu_seqlens: Tensor
    k: int
    ids: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def form(self, name: str) -> Form:
        """naive, chunk or recurrent."""
        return getattr(sse_kernels, f"{name}_sse_{self.variant}")

    def forward(self, form: Form) -> tuple[Tensor, Tensor]:
        """Output and final state."""
        args = [x for name, x in self.tokens.items() if name != "logits"]
        routing = sse_kernels.route(self.tokens["logits"], self.k, ids=self.ids)
        o, state = form(
            *args,
            routing,
            cu_seqlens=self.cu_seqlens,
            initial_state=self.initial_state,
            output_final_state=True,
            **self.options,
        )
        assert state is not None
        return o, state

    def results(self, form: Form) -> dict[str, Tensor]:
        """Output, final state and the gradient of every leaf of a fixed weighting of both."""
        leaves = dict(self.tokens)
        if self.initial_state is not None:
            leaves["initial_state"] = self.initial_state
        for x in leaves.values():
            x.requires_grad_()
        o, state = self.forward(form)
        loss = sum((x.double() * _wave(x)).sum() for x in (o, state))
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found = {
            f"d{n}": torch.zeros_like(x) if d is None else d
            for (n, x), d in zip(leaves.items(), grads, strict=True)
        }
        return {"o": o.detach(), "state": state.detach(), **found}

    def to(self, dtype: torch.dtype) -> Case:
        cast = {name: x.detach().to(dtype) for name, x in self.tokens.items()}
        state = None if self.initial_state is None else self.initial_state.detach().to(dtype)
        return replace(self, tokens=cast, initial_state=state)

    def rows(self, b: int) -> slice:
        return slice(int(self.cu_seqlens[b]), int(self.cu_seqlens[b + 1]))

    def alone(self, b: int) -> Case:
        """Sequence b by itself."""
        rows, state = self.rows(b), self.initial_state
        return replace(
            self,
            tokens={name: x.detach()[rows].clone() for name, x in self.tokens.items()},
            initial_state=None if state is None else state.detach()[b : b + 1].clone(),
            cu_seqlens=torch.tensor([0, rows.stop - rows.start]),
            ids=None if self.ids is None else self.ids[rows],
        )


def _wave(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape).add(0.3).sin()


def _make_case(
    variant: str,
    lengths: list[int],
    *,
    heads: int = 2,
    value_heads: int | None = None,
    dk: int = 5,
    dv: int = 3,
    partitions: int = 4,
    k: int = 1,
    resumed: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: Any,
) -> Case:
    rng = torch.Generator().manual_seed(seed)
    value_heads = value_heads or heads
    total, batch = sum(lengths), len(lengths)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    decay = lambda *shape: torch.nn.functional.logsigmoid(normal(*shape))
    keys = {n: normal(total, heads, dk) for n in ("q1", "k1", "q2", "k2")}
    tokens = {"logits": normal(total, partitions), **keys, "v": normal(total, value_heads, dv)}
    if variant == "gla":
        tokens |= {n: decay(total, heads, dk) / 4 for n in ("g1", "g2")}
    else:
        for n in ("1", "2"):
            tokens[f"g{n}"] = decay(total, value_heads) / 4
            tokens[f"beta{n}"] = 2 * normal(total, value_heads).sigmoid()
    state = normal(batch, 1 + partitions, value_heads, dv, dk) if resumed else None
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return Case(variant, tokens, state, cu_seqlens, k, options=options).to(dtype)


def _difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Largest |left - right| over largest |right|, or 1 if that is smaller, by name."""
    assert left.keys() == right.keys()
    return {
        name: _largest(left[name].double() - right[name].double()) / max(1.0, _largest(right[name]))
        for name in right
    }


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


@pytest.fixture
def make_case() -> Callable[..., Case]:
    return _make_case


@pytest.fixture
def difference() -> Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, float]]:
    return _difference


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel was to write and did not holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
