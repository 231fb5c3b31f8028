"""Write the tables of README.md and docs/ from committed result files.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. With --check nothing is written,
and the exit code is 1 if a file would change.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import conversion_tables
import kernel_tables
from markdown_table import p_value, table

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    stale = []
    for page in PAGES:
        text = page.read_text()
        fresh = MARK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)
        if fresh != text:
            stale.append(page)
            if "--check" not in sys.argv:
                page.write_text(fresh)
    print("\n".join(f"{page.relative_to(ROOT)} changed" for page in stale) or "all up to date")
    sys.exit(bool(stale) and "--check" in sys.argv)


def quickstart() -> str:
    (path,) = (ROOT / "benchmarks" / "results").glob("quickstart-*.json")
    result = json.loads(path.read_text())
    head = "| run | before | after | gain | greedy | boxed before | steps | minutes |\n"
    lines = [
        f"| {row['case']} | {percent(row['base'])} | {percent(row['tuned'])} | "
        f"{100 * row['gain']:+.1f} | "
        f"{percent(row['base_greedy'])} → {percent(row['tuned_greedy'])} | "
        f"{percent(row['base_boxed'])} | {row['steps']} | {row['wall_s'] / 60:.1f} |\n"
        for row in result["rows"]
    ]
    first = result["rows"][0]
    note = (
        f"\navg@{first['samples']} at T = 1 over the same {first['problems']} unseen problems; "
        f"{result['device']}, torch {result['torch']}, {result['date']}, "
        f"commit {result['commit']}, `{result['command']}`.\n"
    )
    return head + "|---" * 8 + "|\n" + "".join(lines) + note


def grpo_gpu() -> str:
    (path,) = (ROOT / "benchmarks" / "results").glob("grpo-gpu-*.json")
    result = json.loads(path.read_text())
    head = "| case | log-prob gap, mean | max | KL | flip rate | rollout tok/s | learner tok/s |\n"
    lines = [
        f"| {row['case']} | {row['rollout_logprob_diff_mean']:.4f} | "
        f"{row['rollout_logprob_diff_max']:.3f} | {row['rollout_kl']:.1e} | "
        f"{100 * row['flip_rate']:.2f} % | {row['rollout_tokens_per_s']:,.0f} | "
        f"{row['learner_tokens_per_s']:,.0f} |\n"
        for row in result["rows"]
    ]
    shape = result["shape"]
    note = (
        f"\n{result['device']}, {shape['dtype']}, width {shape['width']}, "
        f"{shape['layers']} layers, "
        f"{shape['prompts']} x {shape['answers']} answers of {shape['tokens']} tokens, the third "
        f"step; torch {result['torch']}, triton {result['triton']}, {result['date']}, commit "
        f"{result['commit']}, `{result['command']}`. The first case includes first compilations.\n"
    )
    return head + "|---" * 7 + "|\n" + "".join(lines) + note


def rollout_gpu() -> str:
    (path,) = (ROOT / "benchmarks" / "results").glob("rollout-gpu-*.json")
    result = json.loads(path.read_text())
    kinds = ["recurrence", "products", "attention", "sampling", "other"]
    head = "| model, samples together | tokens/s | ms a step | host | GPU | of the GPU's: "
    head += " | ".join(kinds) + " | kernels |\n"
    lines = []
    for row in result["rows"]:
        parts = [f"{row['gpu_ms_by_kind'].get(kind, 0.0):.2f}" for kind in kinds]
        times = [f"{row[f'{name}ms_per_step']:.2f}" for name in ("", "host_", "gpu_")]
        cells = [row["case"], f"{row['tokens_per_s']:,.0f}", *times, *parts]
        lines.append(f"| {' | '.join(cells)} | {row['kernels_per_step']} |\n")
    shape = result["shape"]
    note = (
        f"\n{result['device']}, bf16, SSE-{shape['variant'].upper()} with {shape['state_dtype']} "
        f"states, random weights, prompts of {shape['prompt_tokens']} tokens, "
        f"{shape['answers']} answers of {shape['tokens']} each; tokens/s with prefill; torch "
        f"{result['torch']}, triton {result['triton']}, {result['date']}, commit "
        f"{result['commit']}, `{result['command']}`.\n"
    )
    return head + "|---" * 11 + "|\n" + "".join(lines) + note + _queue(result)


def _queue(result: dict[str, Any]) -> str:
    """What came of `--queue`, if it was given."""
    if not result.get("queue"):
        return ""
    head = "| model, samples | tokens/s | answers/s | prefills | steps | slots in use |\n"
    lines = [
        f"| {row['case']} | {row['tokens_per_s']:,.0f} | {row['answers_per_s']:,.0f} | "
        f"{row['prefills']} | {row['decode_steps']} | {percent(row['slot_use'])} |\n"
        for row in result["queue"]
    ]
    lengths = " or ".join(sorted({f"{row['mean_tokens']:.0f}" for row in result["queue"]}))
    note = (
        f"\n{result['shape']['queue']} times as many samples as slots, which end at random after "
        f"{lengths} tokens on the average, their last ones alone:\n\n"
    )
    return note + head + "|---" * 6 + "|\n" + "".join(lines)


def gsm8k() -> str:
    """The pretrained model before its reinforcement learning and after."""
    path = ROOT / "benchmarks" / "results" / "gsm8k-gsm8k_smollm2.json"
    result = json.loads(path.read_text())
    found, last = result["evaluations"], result["summary"]["steps"]
    lines = []
    for name, step in (("converted, distilled, taught", 0), (f"after {last} steps of GRPO", last)):
        scores, greedy = found[f"heldout-{step}"], found[f"heldout_greedy-{step}"]
        low, high = (100 * x for x in scores["ci_sampling"])
        cells = [f"{percent(scores['avg'])} ({low:.1f} to {high:.1f})", percent(scores["maj"])]
        cells += [percent(scores["pass_at"]["8"]), percent(greedy["avg"])]
        lines.append([name, *cells])
    gain = result["gain"]["heldout"]
    note = (
        f"\nGSM8K's {gain['problems']:,} test problems; {100 * gain['difference']:+.1f} points, "
        f"{p_value(gain['p'])} (paired; intervals: the same problems asked again); one run of "
        f"{result['summary']['wall_s'] / 60:.1f} minutes, held-out evaluations included; "
        f"{result['device']}, torch {result['torch']}, {result['date']}, "
        f"commit {result['commit']}, `{result['command']}`.\n"
    )
    head = ["SmolLM2-135M-Instruct as SSE-H", "avg@8", "maj@8", "pass@8", "greedy"]
    return table(head, lines) + note


def shared_prompts() -> str:
    """A learner's step either way, a block a device."""
    head = ["tokens of a prompt, an answer", "fed whole", "shared", "a step, whole", "shared", ""]
    blocks = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("shared-prompts-*.json")):
        result = json.loads(path.read_text())
        lines = [
            [
                f"{row['prompt']}, {row['answer']}",
                *(f"{row[f'{way} tokens']:,}" for way in ("whole", "shared")),
                *(f"{row[f'{way} s']:.2f} s" for way in ("whole", "shared")),
                f"{row['whole s'] / row['shared s']:.2f} x",
            ]
            for row in result["rows"]
        ]
        if "shared GPU s" in result["rows"][0]:
            lines = [
                [
                    *line,
                    *(f"{row[f'{way} GPU s']:.2f} s" for way in ("whole", "shared")),
                    *(f"{row[f'{way} GB']:.0f} GB" for way in ("whole", "shared")),
                ]
                for line, row in zip(lines, result["rows"], strict=True)
            ]
            columns = [*head, "GPU busy, whole", "shared", "held, whole", "shared"]
        else:
            columns = head
        threads = f", {result['threads']} threads" if result["threads"] else ""
        blocks.append(
            f"{table(columns, lines)}\n{result['device']}{threads}, torch {result['torch']}, "
            f"{result['date']}, commit {result['commit']}, `{result['command']}`.\n"
        )
    return "\n".join(blocks)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


TABLES: dict[str, Any] = {
    "quickstart": quickstart,
    "grpo_gpu": grpo_gpu,
    "rollout_gpu": rollout_gpu,
    "gsm8k": gsm8k,
    "shared_prompts": shared_prompts,
    **kernel_tables.TABLES,
    **conversion_tables.TABLES,
}

if __name__ == "__main__":
    main()
