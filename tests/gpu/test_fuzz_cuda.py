"""Random shapes, lengths and routings on a GPU against fp64, in memory that starts as NaN."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import sse_kernels
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

# Relative Frobenius errors: outputs, gradients.
TOLERANCE = {
    torch.bfloat16: (6e-3, 3e-2),
    torch.float16: (6e-3, 3e-2),
    torch.float32: (1e-4, 1e-3),
}


@dataclass(frozen=True)
class Draw:
    """One random call."""

    seed: int
    lengths: tuple[int, ...]
    h: int
    group: int
    dk: int
    dv: int
    n: int
    k: int
    choice: str
    """random, one (all tokens in one partition) or replay."""
    resumed: bool
    dtype: torch.dtype


def draws(count: int) -> Iterator[Draw]:
    rng = random.Random(0)
    for seed in range(count):
        n, dk = (1, 4, 7, 32, 2)[seed % 5], (32, 64, 128, 256)[seed % 4]
        later = torch.float32 if dk < 128 else torch.float16  # wide fp32 compiles for a minute
        yield Draw(
            seed,
            tuple(rng.choice([0, 1, 2, 63, 64, 65, 130]) for _ in range(rng.randint(1, 5))),
            h=rng.choice([1, 2, 3]),
            group=rng.choice([1, 2]),
            dk=dk,
            dv=(200, 48, 64, 128, 32, 256)[seed // 2 % 6],
            n=n,
            k=rng.randint(1, min(n, 4)),
            choice=("random", "one", "replay")[seed // 3 % 3],
            resumed=rng.random() < 0.7,
            dtype=torch.bfloat16 if seed < 4 else later,
        )


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def leaves_of(draw: Draw, variant: str) -> dict[str, Tensor]:
    torch.manual_seed(draw.seed)
    tokens, streams = sum(draw.lengths), len(draw.lengths)
    normal = lambda *s: torch.randn(*s, device="cuda")
    keys = (tokens, draw.h, draw.dk)
    heads = draw.h * draw.group
    leaves = {name: normal(*keys).to(draw.dtype) for name in ("q1", "k1", "q2", "k2")}
    if variant == "gla":
        leaves |= {name: leaves[name].softmax(-1) for name in ("k1", "k2")}
    leaves["v"] = normal(tokens, heads, draw.dv).to(draw.dtype)
    for stream in "12":
        shape = keys if variant == "gla" else (tokens, heads)
        leaves[f"g{stream}"] = torch.nn.functional.logsigmoid(normal(*shape)) / 8
        if variant == "gdn":
            leaves[f"beta{stream}"] = 2 * normal(tokens, heads).sigmoid()
    leaves["logits"] = normal(tokens, draw.n)
    if draw.choice == "one":
        leaves["logits"][:, 0] += 30.0
    if draw.resumed:
        leaves["state"] = normal(streams, 1 + draw.n, heads, draw.dv, draw.dk)
    return leaves


def results(draw: Draw, form, leaves: dict[str, Tensor], **options) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    ids = None
    if draw.choice == "replay":
        order = leaves["logits"].detach().float().argsort(-1)
        ids = order[:, : draw.k].to(torch.uint8)
    o, state = form(
        *(x for name, x in leaves.items() if name not in ("logits", "state")),
        sse_kernels.route(leaves["logits"], draw.k, ids=ids),
        cu_seqlens=torch.tensor([0, *draw.lengths], device="cuda").cumsum(0),
        initial_state=leaves.get("state"),
        output_final_state=True,
        **options,
    )
    torch.manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, device="cuda")).sum() for x in (o, state))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    return {"o": o.detach(), "state": state.detach(), **named}


# Every draw compiles kernels of its own, so each is given to one operator alone.
OPERATORS = [("gla", {}), ("gdn", {}), ("gdn", {"gate_after_norm": True})]


@pytest.mark.parametrize("draw", draws(12), ids=lambda draw: str(draw.seed))
def test_any_call_gives_the_numbers_of_fp64(draw):
    variant, options = OPERATORS[draw.seed % 3]
    leaves = leaves_of(draw, variant)
    double = {name: x.double() for name, x in leaves.items()}
    exact = results(draw, getattr(sse_kernels, f"chunk_sse_{variant}"), double, **options)
    found = results(draw, getattr(sse_kernels, f"sse_{variant}"), leaves, **options)
    if variant == "gdn" and not options:
        del exact["dlogits"]  # the norm cancels the router's weight
    if draw.choice == "one":
        exact.pop("dlogits", None)  # a saturated softmax passes next to nothing
    output, gradient = TOLERANCE[draw.dtype]
    errors = {
        name: float((found[name].double() - x).norm() / x.norm().clamp(min=1e-3))
        for name, x in exact.items()
    }
    limits = {name: output if name in ("o", "state") else gradient for name in errors}
    assert all(errors[name] <= limits[name] for name in errors), (draw, errors)
