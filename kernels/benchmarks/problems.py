"""Random inputs of SSE-GLA and SSE-GDN over sequences, as a transformer could have made them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sse_kernels import route
from torch import Tensor

Form = Callable[..., tuple[Tensor, Tensor | None]]


class Shape(NamedTuple):
    """Sequences of equal length, H = Hv heads of width D = Dk = Dv, N partitions, K live ones."""

    sequences: int
    length: int
    h: int
    d: int
    n: int
    k: int

    def __str__(self) -> str:
        tokens = self.sequences * self.length
        return f"T={tokens} in {self.sequences}, H={self.h}, D={self.d}, N={self.n}, K={self.k}"


MAIN = Shape(8, 2048, 16, 128, 4, 1)


class Problem:
    """Leaves in the order of the operator's arguments, router logits last, and a gradient of o.

    option: a flag of the operator that is set.
    """

    def __init__(
        self, variant: str, shape: Shape, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0,
        option: str | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        tokens, width = shape.sequences * shape.length, (shape.h, shape.d)
        normal = lambda *s: torch.randn(tokens, *s, device="cuda")
        keys = (lambda: normal(*width).softmax(-1)) if variant == "gla" else (
            lambda: F.silu(normal(*width))
        )  # fmt: skip
        leaves = {}
        for stream in "12":
            leaves[f"q{stream}"] = F.silu(normal(*width)).to(dtype)
            leaves[f"k{stream}"] = keys().to(dtype)
        leaves["v"] = F.silu(normal(*width)).to(dtype)
        for stream in "12":
            if variant == "gla":
                leaves[f"g{stream}"] = F.logsigmoid(normal(*width)) / 16
            else:
                leaves[f"g{stream}"] = _mamba_decay(normal(shape.h))
                leaves[f"beta{stream}"] = normal(shape.h).sigmoid()
        leaves["logits"] = normal(shape.n)
        self.leaves: dict[str, Tensor] = {n: x.requires_grad_() for n, x in leaves.items()}
        self.k, self.options = shape.k, {option: True} if option else {}
        self.cu_seqlens = torch.arange(shape.sequences + 1, device="cuda") * shape.length
        self.do: Tensor | None = None

    def forward(self, form: Form) -> Tensor:
        """o, with nothing kept for a backward pass."""
        with torch.no_grad():
            return self.output(form)

    def both(self, form: Form) -> dict[str, Tensor]:
        """The output and the gradient of every leaf, for a random gradient of the output."""
        o = self.output(form)
        do = self.do
        if do is None:
            torch.manual_seed(1)
            do = self.do = torch.randn(o.shape, device="cuda", dtype=torch.bfloat16)
        gradients = torch.autograd.grad(o, list(self.leaves.values()), do.to(o.dtype))
        named = {f"d{n}": x for n, x in zip(self.leaves, gradients, strict=True)}
        return {"o": o.detach(), **named}

    def output(self, form: Form) -> Tensor:
        *tokens, logits = self.leaves.values()
        routing = route(logits, self.k)
        return form(*tokens, routing, cu_seqlens=self.cu_seqlens, **self.options)[0]

    def double(self) -> Problem:
        """The same numbers in fp64."""
        return self._twin({n: x.detach().double() for n, x in self.leaves.items()})

    def alone(self, b: int) -> Problem:
        """Sequence b without the others."""
        start, end = self.cu_seqlens[b : b + 2].tolist()
        twin = self._twin({n: x.detach()[start:end].clone() for n, x in self.leaves.items()})
        twin.cu_seqlens = self.cu_seqlens[b : b + 2] - start
        twin.do = None if self.do is None else self.do[start:end].clone()
        return twin

    def _twin(self, leaves: dict[str, Tensor]) -> Problem:
        twin = object.__new__(Problem)
        twin.__dict__.update(self.__dict__)
        twin.leaves = {n: x.requires_grad_() for n, x in leaves.items()}
        return twin


def _mamba_decay(a: Tensor) -> Tensor:
    """-rate softplus(a + bias) with the rates and time steps of a fresh layer, [T, H]."""
    heads = a.shape[-1]
    rates = torch.rand(heads, device=a.device) * 16
    low, high = math.log(0.001), math.log(0.1)
    steps = (low + (high - low) * torch.rand(heads, device=a.device)).exp()
    return -rates * F.softplus(a + steps + torch.log(-torch.expm1(-steps)))
