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
    """Leaves in the order of an operator's arguments, router logits last, and a gradient of o.

    variant: "gla" or "gdn", or "gla_layer" or "gdn_layer", whose leaves are raw projections.
    option: a flag of the operator that is set. decays: the dtype of log-decays a channel.
    """

    def __init__(
        self, variant: str, shape: Shape, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0,
        option: str | None = None, decays: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        make = _layer_leaves if variant.endswith("_layer") else _leaves
        self.variant = variant
        self.leaves, self.named = make(variant, shape, dtype)
        for name in self.leaves.keys() & {"g1", "g2"}:
            self.leaves[name] = self.leaves[name].to(decays)
        for x in (*self.leaves.values(), *self.named.values()):
            x.requires_grad_()
        self.k = shape.k
        self.options: dict[str, object] = {"eps": 1e-6} if self.named else {}
        if option:
            self.options[option] = True
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
        leaves = self.leaves | self.named
        gradients = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
        named = {f"d{n}": x for n, x in zip(leaves, gradients, strict=True)}
        return {"o": o.detach(), **named}

    def output(self, form: Form) -> Tensor:
        *tokens, logits = self.leaves.values()
        routing = route(logits, self.k)
        options = self.named | self.options
        return form(*tokens, routing, cu_seqlens=self.cu_seqlens, **options)[0]

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


def _leaves(
    variant: str, shape: Shape, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activated inputs of `sse_gla` or `sse_gdn`; nothing by name."""
    width = (shape.h, shape.d)
    leaves = {}
    for stream in "12":
        key = _normal(shape, *width)
        leaves[f"q{stream}"] = F.silu(_normal(shape, *width)).to(dtype)
        leaves[f"k{stream}"] = (key.softmax(-1) if variant == "gla" else F.silu(key)).to(dtype)
    leaves["v"] = F.silu(_normal(shape, *width)).to(dtype)
    for stream in "12":
        if variant == "gla":
            leaves[f"g{stream}"] = F.logsigmoid(_normal(shape, *width)) / 16
        else:
            leaves[f"g{stream}"] = _mamba_decay(_normal(shape, shape.h))
            leaves[f"beta{stream}"] = _normal(shape, shape.h).sigmoid()
    leaves["logits"] = _normal(shape, shape.n)
    return leaves, {}


def _layer_leaves(
    variant: str, shape: Shape, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Projections before `sse_gla_layer` or `sse_gdn_layer`, and what they take by name."""
    keys = ["q1", "k1", "q2", "k2", "v"] + (["gk1", "gk2"] if variant == "gla_layer" else [])
    leaves = {name: _normal(shape, shape.h, shape.d).to(dtype) for name in keys}
    named = {
        "gate": _normal(shape, shape.h, shape.d).to(dtype),
        "norm_weight": torch.ones(shape.d, device="cuda", dtype=dtype),
    }
    if variant == "gdn_layer":
        leaves |= {name: _normal(shape, 2 * shape.h).to(dtype) for name in ("a", "b")}
        named["A_log"], named["dt_bias"] = _mamba_rates(2 * shape.h)
    leaves["logits"] = _normal(shape, shape.n)
    return leaves, named


def _normal(shape: Shape, *width: int) -> Tensor:
    return torch.randn(shape.sequences * shape.length, *width, device="cuda")


def _mamba_decay(a: Tensor) -> Tensor:
    """-rate softplus(a + bias) of a fresh layer, [T, H]."""
    rates, bias = _mamba_rates(a.shape[-1])
    return -rates.exp() * F.softplus(a + bias)


def _mamba_rates(heads: int) -> tuple[Tensor, Tensor]:
    """Logarithms of the rates, and biases for the time steps, of a fresh layer."""
    rates = 1e-3 + 16 * torch.rand(heads, device="cuda")
    low, high = math.log(0.001), math.log(0.1)
    steps = (low + (high - low) * torch.rand(heads, device="cuda")).exp()
    return rates.log(), steps + torch.log(-torch.expm1(-steps))
