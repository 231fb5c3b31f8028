"""Timing on one GPU, the ceilings beside which times are judged, and the file that keeps them."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """One measured number."""

    case: str
    """What was done: "gla forward"."""
    shape: str
    form: str
    """Who did it: "triton", a baseline, or which of its options."""
    value: float
    unit: str


def milliseconds(call: Callable[[], object], *, rep: int = 200) -> float:
    """Median GPU time of a call in about `rep` ms, with a cold L2."""
    return float(do_bench(call, warmup=50, rep=rep, return_mode="median"))  # pyright: ignore


def graph_milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call inside a CUDA graph: no launch from the host is waited for."""
    return float(do_bench_cudagraph(call, rep=50, return_mode="median"))  # pyright: ignore


def ceilings() -> dict[str, float]:
    """What this GPU does at best: a 1 GiB copy (read + written) and an 8192^3 bf16 product."""
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    return {"copy_gb_s": 2 * 2**30 / copy / 1e6, "matmul_tflop_s": 2 * 8192**3 / product / 1e9}


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed command line, with the options that every benchmark has."""
    parser.add_argument("--commit", help="the commit that is measured (default: git's HEAD)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    return parser.parse_args()


def shown(rows: Iterable[Row], found: list[Row] | None = None) -> list[Row]:
    """The rows as a list (appended to `found`), each printed as soon as it is measured."""
    found = [] if found is None else found
    for row in rows:
        print(f"{row.case:34s} {row.shape:44s} {row.form:26s} {row.value:10.4g} {row.unit}")
        sys.stdout.flush()
        found.append(row)
    return found


def save(name: str, rows: list[Row], options: argparse.Namespace, **more: Any) -> Path:
    """Write <out>/<name>-<device>.json with all that a reader needs to judge the numbers."""
    commit = options.commit or subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], text=True, cwd=RESULTS.parent
    ).strip()  # fmt: skip
    device = torch.cuda.get_device_name()
    report = {
        "name": name,
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        **more,
        "rows": [row._asdict() for row in rows],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}-{device.replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)
    return path
