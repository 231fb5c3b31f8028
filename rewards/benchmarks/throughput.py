"""Answers graded a second on one core, ours and math-verify's, in one process and one run.

    python rewards/benchmarks/throughput.py [--seconds 3] [--out rewards/benchmarks/results]

Cases: AIME with short texts, AIME with texts of 120 kB, and MATH: golds of the benchmark's kinds
against the right form, another right form and a wrong one each. Ours runs in the calling thread
with a pool of one worker; math-verify as its README recommends, time limit 5 s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from sse_rewards import RewardPool

Case = tuple[str, str, str]
MATH = [
    (r"\frac{14}{3}", r"\dfrac{28}{6}", r"\frac{13}{3}"),
    (r"3\sqrt{13}", r"\sqrt{117}", r"2\sqrt{13}"),
    (r"6 - 5i", r"-5i+6", r"6+5i"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", r"(3,\pi)"),
    (r"x^5 - x^4 + x^3 - x^2 + x - 1", r"(x-1)(x^4+x^2+1)", r"(x-1)^5"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19},1+\sqrt{19}", r"1+\sqrt{19}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)", r"(-\infty,2]\cup(3,\infty)"),
    (r"\text{Evelyn}", r"\textbf{Evelyn}", r"\text{Evan}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{bmatrix}0.2\\-3.6\end{bmatrix}", "1"),
    (r"10,\!080", "10080", "1080"),
    (r"52_8", r"52_{8}", "42"),
    (r"2k+2", r"2(k+1)", "2k"),
    (r"\cot x", r"\frac{1}{\tan x}", r"\tan x"),
    ("42", r"\frac{84}{2}", "24"),
    (r"90^\circ", "90", "45"),
    (r"y = 2x + 3", "2x+3", "y=2x-3"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each figure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pool = RewardPool(workers=1)
    pool.score(r"\boxed{\arctan 1}", "2", "math")
    rows = []
    for name, cases in (("AIME, short", aime(0)), ("AIME, 120 kB", aime(24_000)), ("MATH", math())):
        ours = rate(lambda case: pool.score_batch([case]), cases, options.seconds)
        baseline = rate(math_verify, cases, options.seconds)
        rows.append(
            {
                "case": name,
                "ours": round(ours),
                "baseline": round(baseline, 1),
                "unit": "answers/s",
                "ratio": round(ours / baseline, 1),
            }
        )
        print(f"{name:14} {ours:10.0f} /s   math-verify {baseline:8.1f} /s")
    device = platform.machine()
    result = {
        "name": "rewards-throughput",
        "device": f"one core of {cpu_name()}",
        "torch": None,
        "triton": None,
        "math_verify": version("math-verify"),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python rewards/benchmarks/throughput.py",
        "ceilings": {},
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"throughput-{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def aime(words: int) -> list[Case]:
    """A thousand different texts; every third answer is wrong."""
    text = "word " * (words or 40)
    return [
        (f"{text}so $m+n = {n}$.\n\\[\\boxed{{{n + (n % 3 == 0)}}}.\\]", str(n), "aime")
        for n in range(1000 if not words else 100)
    ]


def math() -> list[Case]:
    """Each gold with its own form, another right one and a wrong one, all texts different."""
    return [
        (f"Step {n}. The answer is $\\boxed{{{shown}}}$.", gold, "math")
        for n in range(20)
        for gold, other, wrong in MATH
        for shown in (gold, other, wrong)
    ]


def math_verify(case: Case) -> bool:
    from math_verify import parse, verify

    completion, answer, _ = case
    return verify(parse(f"${answer}$"), parse(completion))


def rate(grade: Callable[[Case], object], cases: list[Case], seconds: float) -> float:
    """Cases a second, over and over for about so long."""
    started = time.perf_counter()
    for done, case in enumerate(itertools.cycle(cases), 1):
        grade(case)
        if done % 10 == 0 and time.perf_counter() - started > seconds:
            return done / (time.perf_counter() - started)
    return 0.0


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
