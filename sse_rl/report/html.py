"""One self-contained page about a run: what it gained, how it learned, what it said."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from sse_rl.errors import UserError
from sse_rl.report.curves import draw, metric_curve
from sse_rl.report.scores import Scored, scored
from sse_rl.report.sinks import METRICS, SAMPLES, read_rows

CURVES = {
    "Reward": ("reward",),
    "Held-out accuracy": ("eval/heldout", "eval/heldout_greedy"),
    "Answer length (tokens)": ("completion_length/mean",),
    "Entropy (nats)": ("entropy",),
    "KL rollout/learner": ("rollout_kl",),
    "Router flip rate": ("flip_rate",),
    "Gradient norm": ("grad_norm",),
    "Groups without signal": ("frac_reward_zero_std",),
}
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#667;--line:#d5d9e0;--paper:#fff;--card:#f6f7f9;
--a:#0b63c5;--b:#d9730d}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#9aa3af;--line:#3a414b;--paper:#14171b;
--card:#1d2127;--a:#6db3ff;--b:#ffb066}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1080px;padding:20px 16px 60px;color:var(--ink);
background:var(--paper);font:15px/1.5 system-ui,sans-serif}h1{font-size:24px;margin:0}
h2{font-size:17px;margin:36px 0 10px}p{margin:4px 0;color:var(--dim)}.cards,.curves{display:grid;
gap:12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin-top:14px}
.curves{grid-template-columns:repeat(auto-fit,minmax(300px,1fr))}.card,figure{background:var(--card);
border-radius:8px;padding:12px 14px;margin:0}.card b{display:block;font-size:22px}
figcaption{font-weight:600;margin-bottom:4px}table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:5px 8px;border-bottom:1px solid var(--line)}
.wide{overflow-x:auto}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);
padding:10px 12px;border-radius:8px;margin:6px 0;font-size:13px}
svg{width:100%;height:auto;display:block}small{color:var(--dim);white-space:nowrap}
dl{display:grid;grid-template-columns:auto 1fr;gap:2px 14px;margin:0}dt{color:var(--dim)}
dd{margin:0;text-align:right;overflow-wrap:anywhere}h2+table td{white-space:nowrap}
"""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from the files of the run, finished or not, and return its path.

    Raises UserError if `run_dir` holds no run, or a damaged evaluation.
    """
    summary_path = run_dir / "summary.json"
    if not (run_dir / "recipe.yaml").exists():
        raise UserError(f"{run_dir}: no run there (it has no recipe.yaml)")
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    rows, samples = read_rows(run_dir / METRICS), read_rows(run_dir / SAMPLES)
    recipe = (run_dir / "recipe.yaml").read_text()
    path = run_dir / "report.html"
    text = page(summary, rows, samples, recipe, list(scored(run_dir)))
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def page(
    summary: dict[str, Any],
    rows: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    recipe: str,
    scores: list[Scored],
) -> str:
    name = escape(str(summary.get("name", "run")))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f'<link rel=icon href="data:,"><style>{STYLE}</style><h1>{name}</h1>'
        f"{_headline(summary, rows)}{_evaluations(summary.get('eval', {}))}"
        f"<h2>How it learned</h2><div class=curves>{_curves(rows, scores)}</div>"
        f"{_facts(summary)}{_samples(samples)}<h2>Recipe</h2><pre>{escape(recipe)}</pre></html>"
    )


def _headline(summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    heldout = summary.get("eval", {}).get("heldout", {})
    cards = []
    if "gain" in heldout:
        cards += [
            ("before GRPO", _percent(heldout["base"])),
            ("after GRPO", _percent(heldout["tuned"])),
            ("gain", f"{100 * heldout['gain']:+.1f} points"),
        ]
    cards += [("steps", str(summary.get("steps", len(rows))))]
    if "wall_s" in summary:
        cards.append(("wall time", f"{summary['wall_s'] / 60:.1f} min"))
    status = escape(str(summary.get("status", "not finished")))
    drawn = "".join(
        f"<div class=card>{label}<b>{escape(value)}</b></div>" for label, value in cards
    )
    error = summary.get("error")
    shown = f"<pre>{escape(error)}</pre>" if error else ""
    warned = "".join(f"<p><b>{escape(text)}</b></p>" for text in summary.get("warnings", ()))
    return f"<p>{status}</p>{shown}{warned}<div class=cards>{drawn}</div>"


def _evaluations(evaluations: dict[str, dict[str, Any]]) -> str:
    if not evaluations:
        return ""
    columns = {
        "base": "before",
        "tuned": "after",
        "base_greedy": "greedy before",
        "tuned_greedy": "greedy after",
        "base_boxed": "boxed before",
        "tuned_boxed": "boxed after",
        "base_truncated": "truncated before",
        "tuned_truncated": "truncated after",
    }
    head = "".join(
        f"<th>{title}" for title in ["benchmark", "problems × samples", *columns.values()]
    )
    body = "".join(
        f"<tr><td>{escape(name)}<td>{entry.get('problems', '')} × {entry.get('samples', '')}"
        + "".join(
            f"<td>{_percent(entry.get(column))}{_interval(entry.get(f'{column}_interval'))}"
            for column in columns
        )
        for name, entry in evaluations.items()
    )
    return (
        f"<h2>Evaluations</h2><div class=wide><table><tr>{head}{body}</table></div>"
        "<p>Intervals are of 95 %: where a score would fall if the same problems were asked again; "
        "the bars below, if other problems of the kind were.</p>"
    )


def _facts(summary: dict[str, Any]) -> str:
    """Settings and what training measured, as two lists of names and values."""
    parts = []
    for title, tree in (
        ("Settings", summary.get("settings")),
        ("Over the run", _training(summary)),
    ):
        lines = "".join(f"<dt>{escape(k)}<dd>{escape(v)}" for k, v in _flat(tree or {}))
        if lines:
            parts.append(f"<div><h2>{title}</h2><dl>{lines}</dl></div>")
    return f"<div class=curves>{''.join(parts)}</div>"


def _training(summary: dict[str, Any]) -> dict[str, Any]:
    return summary.get("training", {}) | summary.get("throughput", {})


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found.append((prefix + key, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return found


def _curves(rows: list[dict[str, Any]], scores: list[Scored]) -> str:
    figures = []
    for title, keys in CURVES.items():
        curves = [c for c in (metric_curve(key, rows, scores) for key in keys) if c.points]
        if curves:
            figures.append(f"<figure><figcaption>{title}</figcaption>{draw(curves)}</figure>")
    return "".join(figures)


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    chosen = samples[:3] + samples[-3:] if len(samples) > 6 else samples
    parts = [
        f"<p>step {row['step']} · answer {escape(str(row['answer']))} · reward {row['reward']} · "
        f"{row['tokens']} tokens · {escape(', '.join(row['statuses'].values()))}</p>"
        f"<pre>{escape(row['prompt'])}<b>{escape(row['completion'])}</b></pre>"
        for row in chosen
    ]
    return f"<h2>Rollouts, first and last</h2>{''.join(parts)}"


def _interval(bounds: list[float] | None) -> str:
    if not bounds:
        return ""
    return f"<br><small>{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}</small>"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
