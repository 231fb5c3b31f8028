"""Times the language-model head on one GPU beside TRL's and Liger's, and stores what it found.

    python kernels/benchmarks/bench_head.py [--commit HASH]

From hidden states and weight, both bf16, to log-probs and entropies of sampled tokens, and back to
both gradients. The floor is the four products that no form avoids who does not keep the logits: the
logits twice, and both gradients, by cuBLAS with bf16 results, on blocks of 16384 of the vocabulary.
TRL (`trl.kernels.chunked_logprob`) and Liger (fused linear cross-entropy, per token, fp32 sums, no
entropy) take part where they are installed. Memory is the peak beyond inputs and gradients; errors
are against fp64 on the same rounded inputs. Writes kernels/benchmarks/results/head-<device>.json.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import Row, arguments, ceilings, milliseconds, save, shown
from sse_kernels import linear_logits, linear_logprob
from torch import Tensor

Form = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""hidden, weight, targets -> log-probs and, if it has them, entropies."""


class Shape(NamedTuple):
    tokens: int
    vocabulary: int
    width: int

    def __str__(self) -> str:
        return f"T={self.tokens}, V={self.vocabulary}, d={self.width}"


MAIN = Shape(32768, 151936, 2048)
OTHERS = [MAIN._replace(tokens=4096), Shape(32768, 49152, 1024)]
PRECISE = MAIN._replace(tokens=1024)


class Problem:
    """Hidden states after a norm, logits of deviation 4.5, tokens drawn from their softmax."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        normal = lambda *s: torch.randn(*s, device="cuda")
        hidden = normal(shape.tokens, shape.width)
        weight = normal(shape.vocabulary, shape.width) * 4.5 * shape.width**-0.5
        self.leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
        self.dlogprobs = normal(shape.tokens) / shape.tokens
        del hidden, weight
        with torch.no_grad():
            parts = self.leaves[0].split(1024)
            drawn = [linear_logits(h, self.leaves[1]).softmax(-1).multinomial(1) for h in parts]
        self.targets = torch.cat(drawn)[:, 0]

    def forward(self, form: Form) -> tuple[Tensor, ...]:
        hidden, weight = self.leaves
        with torch.no_grad():
            return form(hidden, weight, self.targets)

    def both(self, form: Form) -> list[Tensor]:
        """Results, and the gradients of hidden and weight."""
        hidden, weight = self.leaves
        out = form(hidden, weight, self.targets)
        gradients = torch.autograd.grad(out[0], self.leaves, self.dlogprobs.to(out[0].dtype))
        return [*(x.detach() for x in out), *gradients]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return linear_logprob(hidden, weight, targets)


def rounded(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The plain form: all logits, rounded to bf16 as `nn.Linear` does."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def trl() -> Form:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Head

    return lambda h, w, t: Head.apply(h, w, None, t, 1.0, 32768, None, 1.0, ("entropy",))[:2]  # pyright: ignore


def liger() -> Form:
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore
        LigerFusedLinearCrossEntropyFunction as Head,
    )

    def form(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        loss = Head.apply(
            h, w, t, None, None, -100, 0.0, 0.0, "none", None, False, torch.float32
        )  # fmt: skip
        return (-loss[0],)

    return form


def baselines() -> dict[str, Form]:
    found = {}
    for name, load in (("TRL", trl), ("Liger", liger)):
        try:
            found[name] = load()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return found


def floor(problem: Problem) -> None:
    """Four products, and nothing else; their results are thrown away."""
    hidden, weight = (x.detach() for x in problem.leaves)
    logits = hidden.new_empty(len(hidden), 16384)
    dhidden, dweight = torch.empty_like(hidden), weight[:16384].clone()
    for w in weight.split(16384):
        z = logits.view(-1)[: len(hidden) * len(w)].view(len(hidden), len(w))
        for _ in range(2):
            torch.mm(hidden, w.T, out=z)
        torch.mm(z, w, out=dhidden)
        torch.mm(z.T, hidden, out=dweight[: len(w)])


def times(shape: Shape, forms: dict[str, Form], rep: int) -> Iterator[Row]:
    """Each form's time and memory, the floor before and after them."""
    problem = Problem(shape)
    measure = functools.partial(milliseconds, rep=rep)
    yield Row("four products", str(shape), "cuBLAS", measure(lambda: floor(problem)), "ms")
    for name, form in forms.items():
        for case, run in (("forward", problem.forward), ("forward+backward", problem.both)):
            yield Row(case, str(shape), name, measure(functools.partial(run, form)), "ms")
        yield Row("peak memory", str(shape), name, extra_memory(problem, form), "GB")
    yield Row("four products", str(shape), "cuBLAS, again", measure(lambda: floor(problem)), "ms")


def extra_memory(problem: Problem, form: Form) -> float:
    """Peak of forward and backward beyond what was there and what comes back, in GB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = problem.both(form)
    returned = sum(x.numel() * x.element_size() for x in result)
    return (torch.cuda.max_memory_allocated() - before - returned) / 1e9


def precision(forms: dict[str, Form]) -> Iterator[Row]:
    """Log-probs and entropies: largest and mean error in nats; gradients: relative, Frobenius."""
    problem = Problem(PRECISE)
    leaves = problem.leaves
    problem.leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = problem.both(ours)
    problem.leaves = leaves
    for name, form in {**forms, "logits in bf16": rounded}.items():
        *values, dhidden, dweight = problem.both(form)
        for label, x, y in zip(("log-prob", "entropy"), values, exact, strict=False):
            gap = (x.double() - y).abs()
            yield Row(f"error of {label}, max", str(PRECISE), name, float(gap.max()), "nats")
            yield Row(f"error of {label}, mean", str(PRECISE), name, float(gap.mean()), "nats")
        for label, x, y in zip(("hidden", "weight"), (dhidden, dweight), exact[2:], strict=True):
            error = float((x.double() - y).norm() / y.norm())
            yield Row(f"error of {label}'s gradient", str(PRECISE), name, error, "1")
    twice = [problem.both(ours) for _ in range(2)]
    same = all(torch.equal(x, y) for x, y in zip(*twice, strict=True))
    yield Row(
        "two runs are equal to the bit", str(PRECISE), "linear_logprob", float(same), "1 = yes"
    )


def main() -> None:
    options = arguments(argparse.ArgumentParser())
    forms = {"linear_logprob": ours, **baselines()}
    rows = shown(precision(forms))
    rows += shown(times(MAIN, forms, rep=1000))
    for shape in OTHERS:
        rows += shown(times(shape, {"linear_logprob": ours}, rep=200))
    save("head", rows, options, ceilings=ceilings())


if __name__ == "__main__":
    main()
