"""Times the SSE operators on one GPU beside their baselines, and stores what it found.

    python kernels/benchmarks/bench_sse.py [--only gla|decode] [--reference] [--commit HASH]

Token mixing is everything from activated q1 k1 q2 k2 v, log-decays and router logits to the summed
o: softmax, choice, plan and sweeps. Inputs are random, times are medians, bf16. Baselines, in the
same run: the torch form of `sse_kernels`, for decoding the measured copy bandwidth, and with
--reference the authors' algorithm rebuilt on flash-linear-attention's `chunk_gla` (its first call
tunes for minutes).
Writes kernels/benchmarks/results/sse-<device>.json.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
sys.path.insert(0, str(Path(__file__).parents[1]))

import sse_kernels
import torch
import triton
from sse_kernels import Routing, route
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

RESULTS = Path(__file__).parent / "results"


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
SHAPES = [
    MAIN,
    MAIN._replace(k=2),
    MAIN._replace(n=8),
    MAIN._replace(length=8192),
    MAIN._replace(h=8, d=256),
    MAIN._replace(h=32, d=64),
    MAIN._replace(sequences=1, length=16384),
    MAIN._replace(length=32768),
]


class Row(NamedTuple):
    """One line of the results; ratio is baseline / ours for times, ours / baseline for rates."""

    case: str
    ours: float
    baseline: float | None
    unit: str
    ratio: float | None


class Problem:
    """Random inputs of SSE-GLA that a transformer could have made."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        torch.manual_seed(seed)
        tokens, width = shape.sequences * shape.length, (shape.h, shape.d)
        silu, decay = torch.nn.functional.silu, torch.nn.functional.logsigmoid
        normal = lambda *s: torch.randn(tokens, *s, device="cuda")
        q = [silu(normal(*width)).to(dtype) for _ in range(2)]
        k = [normal(*width).softmax(-1).to(dtype) for _ in range(2)]
        v = silu(normal(*width)).to(dtype)
        g = [decay(normal(*width)) / 16 for _ in range(2)]
        leaves = (q[0], k[0], q[1], k[1], v, *g, normal(shape.n))
        self.leaves = tuple(x.requires_grad_() for x in leaves)
        self.k = shape.k
        self.cu_seqlens = torch.arange(shape.sequences + 1, device="cuda") * shape.length

    def forward(self, form: Callable[..., Any]) -> Tensor:
        with torch.no_grad():
            return self._o(form)

    def both(self, form: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Output and gradients of all leaves."""
        o = self._o(form)
        torch.manual_seed(1)
        do = torch.randn(o.shape, device="cuda", dtype=torch.bfloat16).to(o.dtype)
        return o.detach(), *torch.autograd.grad(o, self.leaves, do)

    def double(self) -> Problem:
        """The same numbers in fp64."""
        twin = object.__new__(Problem)
        twin.__dict__.update(self.__dict__)
        twin.leaves = tuple(x.detach().double().requires_grad_() for x in self.leaves)
        return twin

    def _o(self, form: Callable[..., Any]) -> Tensor:
        *tokens, logits = self.leaves
        return form(*tokens, route(logits, self.k), cu_seqlens=self.cu_seqlens)[0]


def reference_gla(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, g1: Tensor, g2: Tensor,
    routing: Routing, *, cu_seqlens: Tensor,
) -> tuple[Tensor, None]:  # fmt: skip
    """The authors' sorted form, rebuilt: gather, cat, one varlen call of fla, index_add."""
    from fla.ops.gla import chunk_gla  # pyright: ignore

    n, k = routing.probs.shape[1], routing.ids.shape[1]
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=v.device), lengths)
    segment = (sequence[:, None] * n + routing.ids).flatten()
    order = segment.sort(stable=True).indices
    token = order // k
    w = routing.weights.flatten()[order, None, None].to(v.dtype)
    counts = torch.unique(segment, return_counts=True)[1]
    bounds = torch.cat([lengths, counts]).cumsum(0)
    q, key = torch.cat([q1, q2[token] * w]), torch.cat([k1, k2[token] * w])
    values, g = torch.cat([v, v[token]]), torch.cat([g1, g2[token]])
    bounds = torch.nn.functional.pad(bounds, (1, 0))
    o = chunk_gla(*(x[None] for x in (q, key, values, g)), cu_seqlens=bounds)[0][0]
    return o[: len(v)].index_add(0, token, o[len(v) :]), None


def bench_gla(reference: bool) -> list[Row]:
    """Forward and forward + backward of token mixing."""
    ours, rows = sse_kernels.sse_gla, []
    form = reference_gla if reference else sse_kernels.chunk_sse_gla
    for shape in SHAPES:
        problem = Problem(shape)
        compared = shape == MAIN
        for name, run in (("forward", problem.forward), ("forward+backward", problem.both)):
            call = functools.partial(run, ours)
            baseline = _ms(functools.partial(run, form)) if compared else None
            rows.append(_time(f"gla {name}, {shape}", _ms(call), baseline))
            if compared:
                rows.append(_time(f"gla {name} in a CUDA graph, {shape}", _graph_ms(call), None))
        del problem
        torch.cuda.empty_cache()
    return rows


def bench_million() -> list[Row]:
    """A million tokens forward, which fills most of 80 GB."""
    torch.cuda.empty_cache()
    shape = MAIN._replace(length=131072)
    problem = Problem(shape)
    torch.cuda.empty_cache()
    return [_time(f"gla forward, {shape}", _ms(lambda: problem.forward(sse_kernels.sse_gla)), None)]


def bench_errors() -> list[Row]:
    """Relative Frobenius error of outputs and gradients against fp64 on the same rounded inputs."""
    problem = Problem(Shape(4, 1000, 4, 128, 4, 2), seed=1)
    exact = problem.double().both(sse_kernels.chunk_sse_gla)
    found = problem.both(sse_kernels.sse_gla)
    again = problem.both(sse_kernels.sse_gla)
    names = ["o", "dq1", "dk1", "dq2", "dk2", "dv", "dg1", "dg2", "dlogits"]
    rows = [
        Row(
            f"gla error of {name}, T=4000 in 4, H=4, D=128, N=4, K=2", _error(a, b), None, "1", None
        )
        for name, a, b in zip(names, found, exact, strict=True)
    ]
    same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return [*rows, Row("gla runs bit-identical", float(same), None, "1 = yes", None)]


def bench_first_call() -> list[Row]:
    """First calls with an empty cache of compiled kernels."""
    problem, rows = Problem(MAIN), []
    for name, run in (("forward", problem.forward), ("forward+backward after it", problem.both)):
        start = time.perf_counter()
        run(sse_kernels.sse_gla)
        torch.cuda.synchronize()
        rows.append(Row(f"gla first {name}", time.perf_counter() - start, None, "s", None))
    return rows


def bench_decode(copy_gb_s: float) -> list[Row]:
    """One layer's state update; bytes are the touched states, read and written once."""
    rows, h, d, n, k = [], 16, 128, 4, 1
    for variant in ("gla", "gdn"):
        step = getattr(sse_kernels, f"sse_{variant}_step")
        for batch in (1, 64, 256):
            for dtype in (torch.float32, torch.bfloat16):
                width = (d,) if variant == "gla" else ()
                normal = lambda *s: torch.randn(batch, h, *s, device="cuda", dtype=torch.bfloat16)  # noqa: B023
                gates = [-torch.rand(batch, h, *width, device="cuda") for _ in range(2)]
                if variant == "gdn":
                    gates = [gates[0], gates[0].exp(), gates[1], gates[1].exp()]
                args = [*(normal(d) for _ in range(5)), *gates]
                routing = route(torch.randn(batch, n, device="cuda"), k)
                # Enough slots that the states do not stay in the cache between replays.
                state = torch.randn(max(batch, 64) + 1, 1 + n, h, d, d, device="cuda", dtype=dtype)
                slots = torch.randperm(batch, device="cuda") + 1
                ms = _graph_ms(
                    lambda: step(*args, routing, state=state, slots=slots)  # noqa: B023
                )
                moved = 2 * batch * (1 + k) * h * d * d * state.element_size()
                case = f"{variant} step, batch {batch}, H=16, D=128, K=1, state {dtype}"
                rate = moved / ms / 1e6
                rows.append(Row(case, ms * 1e3, None, "us", None))
                if batch > 1:
                    rows.append(Row(f"{case}: rate", rate, copy_gb_s, "GB/s", rate / copy_gb_s))
    return rows


def ceilings() -> dict[str, float]:
    """What this GPU does at best: a 1 GiB copy (read + written) and an 8192^3 bf16 product."""
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = _ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _ms(lambda: a @ b)
    return {"copy_gb_s": 2 * 2**30 / copy / 1e6, "matmul_tflop_s": 2 * 8192**3 / product / 1e9}


def _ms(call: Callable[[], object]) -> float:
    return float(do_bench(call, warmup=50, rep=200, return_mode="median"))  # pyright: ignore


def _graph_ms(call: Callable[[], object]) -> float:
    return float(do_bench_cudagraph(call, rep=50, return_mode="median"))  # pyright: ignore


def _time(case: str, ms: float, baseline: float | None) -> Row:
    return Row(case, ms, baseline, "ms", None if baseline is None else baseline / ms)


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["gla", "decode"])
    parser.add_argument("--reference", action="store_true", help="compare with fla's chunk_gla")
    parser.add_argument("--commit", help="the commit that is measured (default: git's HEAD)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    commit = arguments.commit or subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], text=True, cwd=RESULTS.parent
    ).strip()  # fmt: skip
    device = torch.cuda.get_device_name()
    top = ceilings()
    gla = functools.partial(bench_gla, arguments.reference)
    decode = functools.partial(bench_decode, top["copy_gb_s"])
    parts: dict[str, list[Callable[[], list[Row]]]] = {
        "gla": [bench_first_call, bench_errors, gla, bench_million],
        "decode": [decode],
    }
    rows: list[Row] = []
    for name, benchmarks in parts.items():
        for benchmark in benchmarks if arguments.only in (None, name) else []:
            found = benchmark()
            rows += found
            for row in found:
                ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
                print(f"{row.case:75s} {row.ours:10.4g} {row.unit:8s} {ratio}", flush=True)
    report = {
        "name": "sse",
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "ceilings": top,
        "rows": [row._asdict() for row in rows],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"sse-{device.replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
