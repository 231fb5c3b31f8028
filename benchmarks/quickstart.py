"""Collect finished runs of the quickstart and its controls into results/quickstart-<device>.json.

python benchmarks/quickstart.py --command "make quickstart" runs/seed0 runs/seed1 runs/shuffled
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import yaml
from result_file import add_options, header, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--command", required=True, help="what the runs were started with")
    parser.add_argument("--device", default=f"cpu-{os.cpu_count()}-cores")
    add_options(parser)
    options = parser.parse_args()
    device = f"{options.device} ({platform.machine()})"
    result = {
        "name": "quickstart",
        **header(device, options.command, options.commit),
        "rows": [row(run) for run in options.runs],
    }
    save(result, options.out, "quickstart", options.device)


def row(run: Path) -> dict[str, Any]:
    """One run: its settings that differ between runs, its scores, its speed, its numerical gap."""
    summary = json.loads((run / "summary.json").read_text())
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    heldout = summary["eval"]["heldout"]
    return {
        "case": summary["name"],
        "seed": recipe["seed"],
        "learning_rate": recipe["grpo"]["learning_rate"],
        "shuffle_rewards": recipe["grpo"]["shuffle_rewards"],
        "exact_logprobs": recipe["grpo"]["exact_logprobs"],
        "steps": summary["steps"],
        "wall_s": summary["wall_s"],
        **{key: heldout[key] for key in sorted(heldout)},
        "entropy_first": steps[0]["entropy"],
        "entropy_last": steps[-1]["entropy"],
        "flip_rate_max": max(step["flip_rate"] for step in steps),
        "logprob_gap_mean_first": steps[0]["rollout_logprob_diff_mean"],
        "logprob_gap_mean_last": steps[-1]["rollout_logprob_diff_mean"],
        "logprob_gap_max": max(step["rollout_logprob_diff_max"] for step in steps),
    }


if __name__ == "__main__":
    main()
