"""summary.json: what a run was, what it gained, and the figures that one needs to quote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sse_rl.pipeline.best import kept
from sse_rl.pipeline.collapse import collapse
from sse_rl.pipeline.difficulty import FILE as DIFFICULTY
from sse_rl.pipeline.difficulty import pass_rates, read_rates
from sse_rl.pipeline.folder import EXPORT, RECIPE, SUMMARY, read_summary, write_whole
from sse_rl.pipeline.remarks import WINDOW, remarks
from sse_rl.recipe import Recipe
from sse_rl.recipe_io import load_recipe
from sse_rl.report.html import write_report
from sse_rl.report.scores import scored
from sse_rl.report.sinks import METRICS, read_rows

WHEN = {"avg": "", "ci_sampling": "_interval", "boxed": "_boxed", "truncated": "_truncated"}
"""What is told of an evaluation, and the ending of its name in the summary."""


def summarize(
    recipe: Recipe,
    run_dir: Path,
    status: str,
    *,
    before: Mapping[str, Any],
    start: int,
    seconds: float,
    stages: Mapping[str, float],
    error: BaseException | None = None,
) -> dict[str, Any]:
    """Write summary.json and report.html and return the summary. `seconds`, and those of each of
    `stages`, are added to those of `before`, the summary of former attempts; `start` is the GRPO
    step that this one went on from."""
    rows = read_rows(run_dir / METRICS)
    export, best = run_dir / EXPORT, kept(run_dir)
    summary = {
        "name": recipe.name,
        "status": status,
        "error": None if error is None else f"{type(error).__name__}: {error}",
        "steps": rows[-1]["step"] if rows else 0,
        "stopped_early": stopped_early(rows, recipe),
        "warnings": warnings(rows, recipe),
        "resumed_after": [*before.get("resumed_after", []), *([start] if start else [])],
        "wall_s": round(before.get("wall_s", 0.0) + seconds, 1),
        "stage_s": stage_seconds(before.get("stage_s", {}), stages),
        "settings": settings(recipe),
        "difficulty": difficulty(run_dir),
        "best": best._asdict() if best is not None else None,
        "eval": evaluations(run_dir, recipe),
        "training": training(rows),
        "throughput": throughput(rows),
        "export": str(export) if export.exists() else None,
    }
    write_whole(run_dir / SUMMARY, json.dumps(summary, indent=1))
    write_report(run_dir)
    return summary


def rescore(run_dir: Path) -> None:
    """The scores in summary.json and report.html of a run, from its evaluations as they are now;
    what they were when the best weights were chosen stays."""
    summary = read_summary(run_dir)
    if summary:
        summary["eval"] = evaluations(run_dir, load_recipe(run_dir / RECIPE))
        write_whole(run_dir / SUMMARY, json.dumps(summary, indent=1))
    write_report(run_dir)


def stage_seconds(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Both together, by stage; what took no time is left out."""
    names = dict.fromkeys([*before, *now])
    spent = {name: round(before.get(name, 0.0) + now.get(name, 0.0), 1) for name in names}
    return {name: seconds for name, seconds in spent.items() if seconds}


def settings(recipe: Recipe) -> dict[str, Any]:
    """The seeds and the settings that a quoted figure depends on first."""
    told: dict[str, Any] = {
        "seed": recipe.seed,
        "data_seed": recipe.data.train.seed if recipe.data.train.task else None,
        "eval": {"temperature": recipe.eval.temperature, "top_p": recipe.eval.top_p},
    }
    if recipe.sft is not None:
        told["sft"] = {
            key: getattr(recipe.sft, key) for key in ("max_steps", "learning_rate", "max_length")
        }
    if recipe.grpo is not None:
        keys = ("max_steps", "prompts_per_step", "num_generations", "max_completion_length")
        keys += ("learning_rate", "loss_type", "scale_rewards", "beta", "temperature")
        keys += ("max_staleness", "dynamic_sampling", "routing_replay", "shuffle_rewards")
        told["grpo"] = {key: getattr(recipe.grpo, key) for key in keys}
    return told


def evaluations(run_dir: Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """benchmark -> {base, tuned, gain, base_greedy, tuned_greedy, ...} of what was evaluated before
    the first step and after the last."""
    rows = read_rows(run_dir / METRICS)
    last = recipe.grpo.max_steps if recipe.grpo else 0
    if stopped_early(rows, recipe):
        last = rows[-1]["step"]
    found: dict[str, dict[str, Any]] = {}
    for name, step, summary in scored(run_dir):
        when = {0: "base", last: "tuned"}.get(step)
        if when is None:
            continue
        benchmark, greedy = name.removesuffix("_greedy"), name.endswith("_greedy")
        entry = found.setdefault(benchmark, {})
        if greedy:
            entry[f"{when}_greedy"] = summary["avg"]
        else:
            entry |= {when + ending: summary[key] for key, ending in WHEN.items()}
            entry |= {key: summary[key] for key in ("problems", "samples")}
    for entry in found.values():
        if None not in (entry.get("base"), entry.get("tuned")):
            entry["gain"] = entry["tuned"] - entry["base"]
    return found


def stopped_early(rows: list[dict[str, Any]], recipe: Recipe) -> str | None:
    """Why training ended before `max_steps`, if it did."""
    if recipe.grpo is None or (rows and rows[-1]["step"] == recipe.grpo.max_steps):
        return None
    return collapse(rows, recipe.grpo.early_stop)


def warnings(rows: list[dict[str, Any]], recipe: Recipe) -> list[str]:
    """Remarks on the whole run, and on its last steps what is not said of the whole."""
    if recipe.grpo is None:
        return []
    return list((remarks(rows[-WINDOW:], recipe.grpo) | remarks(rows, recipe.grpo)).values())


def difficulty(run_dir: Path) -> dict[str, float] | None:
    """Pass rates of the training prompts before GRPO, if they were measured."""
    rates = read_rates(run_dir / DIFFICULTY)
    return {"prompts": len(rates)} | pass_rates(rates) if rates else None


def training(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How well rollout and learner agreed over the whole run, and where it began and ended."""
    flips = _values(rows, "flip_rate")
    told: dict[str, Any] = {
        "logprob_diff_max": max(_values(rows, "rollout_logprob_diff_max"), default=None),
        "flip_rate_mean": sum(flips) / len(flips) if flips else None,
        "flip_rate_max": max(flips, default=None),
    }
    for key in ("reward", "entropy", "completion_length/mean"):
        values = _values(rows, key)
        told[f"{key}_first"] = values[0] if values else None
        told[f"{key}_last"] = values[-1] if values else None
    for key in ("nonfinite", "sampling/dropped_stale", "sampling/dropped_no_signal"):
        told[key] = sum(_values(rows, key))
    told["worker_restarts"] = max(_values(rows, "perf/worker_restarts"), default=0)
    return told


def throughput(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps: seconds in rollout and learner, tokens learned from a second."""
    keys = ("perf/rollout_s", "perf/learn_s", "perf/tokens_per_s")
    named = {key.removeprefix("perf/"): _values(rows, key) for key in keys}
    return {name: sum(values) / len(values) for name, values in named.items() if values}


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]
