"""What recipes/gsm8k_smollm2.yaml showed: runs collected into result files, and docs/results.md.

    python benchmarks/gsm8k.py collect runs/gsm8k_smollm2 [--rival runs/teacher]
        [--eval teacher=evals/teacher/gsm8k_test ...]
    python benchmarks/gsm8k.py draw                       # docs/results.md and its curves

`collect` writes results/gsm8k-<run>.json, everything that is shown of a run; `draw` writes the
page: the run of the recipe in full, then what other runs had set otherwise and came to.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from markdown_table import p_value, table
from result_file import RESULTS, add_options, header, save
from sse_eval.compare import compare
from sse_eval.words import between

from sse_rl.report.curves import Curve, draw, metric_curve
from sse_rl.report.scores import Scored, scored
from sse_rl.report.sinks import read_rows

ROOT = Path(__file__).parent.parent
RECIPE = "gsm8k_smollm2"
RIVAL = "teacher, trained for the tokens of both"
PAGE, PICTURES = ROOT / "docs/results.md", "results"
SCORES = ("avg", "ci_sampling", "ci_bootstrap", "pass_at", "maj", "boxed", "truncated", "tokens")
CURVES = {
    "reward": ("reward",),
    "accuracy": ("eval/heldout", "eval/heldout_greedy"),
    "length": ("completion_length/mean", "completion_length/ended"),
    "entropy": ("entropy",),
    "kl": ("rollout_kl",),
    "flips": ("flip_rate",),
}
AROUND_A_STOP = {
    "reward": 3,
    "entropy": 3,
    "completion_length/mean": 1,
    "grad_norm": 3,
    "rollout_kl": 5,
}
"""Metrics and their decimals."""
STYLE = "svg{--a:#0b63c5;--b:#d9730d;--line:#c5cad2;--dim:#667}text{font-family:sans-serif}"
SHOWN_SAMPLES = 4
SCORED = ["evaluation", "problems × samples", "T, top-p", "score", "asked again", "other problems"]
SCORED += ["maj", "pass", "boxed", "tokens, at most", "truncated"]
INTRODUCTION = """# A pretrained model learns grade-school mathematics

What `recipes/gsm8k_smollm2.yaml` did as it was at the commits named, drawn by
`benchmarks/gsm8k.py` from its result files. An evaluation is named by its protocol (`_greedy`:
temperature 0) and the GRPO step of its weights; step 0 is the model after the cold start. Beside a
score stand intervals of 95 %: where it would fall if the same problems were asked again, or other
problems of the kind; bars in the curve of accuracy are the latter. All settings were scored on the
test problems: who chooses among them by that has seen the test set. `gsm8k_train.jsonl` and
`gsm8k_test.jsonl` hold openai/gsm8k as rows {id, problem, answer, solution}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("run", type=Path)
    collecting.add_argument("--rival", type=Path, help="run that trained the teacher alone")
    collecting.add_argument("--eval", action="append", default=[], metavar="NAME=FOLDER")
    add_options(collecting)
    commands.add_parser("draw")
    options = parser.parse_args()
    if options.command == "draw":
        draw_page()
    else:
        others = dict(entry.split("=", 1) for entry in options.eval)
        result = collect(options.run, {k: Path(v) for k, v in others.items()}, options.commit)
        if options.rival is not None:
            perplexity = _json(options.rival / "distill" / "perplexity.json")
            result["perplexity"][RIVAL] = perplexity["teacher, trained"]
        save(result, options.out, "gsm8k", result["name"])


def collect(run: Path, others: dict[str, Path], commit: str | None) -> dict[str, Any]:
    """All that is shown of the run in a folder, finished or not, and of evaluations beside it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    summary = _json(run / "summary.json")
    folders = {path.name: path for path in sorted((run / "eval").glob("*-*"))} | others
    return {
        "name": summary.get("name", run.name),
        **header(device, "sse-rl run recipes/gsm8k_smollm2.yaml", commit, triton=False),
        "recipe": _without_places((run / "recipe.yaml").read_text()),
        "summary": summary | {"export": None},
        "perplexity": _json(run / "distill" / "perplexity.json"),
        "distill": read_rows(run / "distill.jsonl"),
        "sft": read_rows(run / "sft.jsonl"),
        "steps": read_rows(run / "metrics.jsonl"),
        "evaluations": {name: _scores(path) for name, path in folders.items()},
        "gain": _gain(run),
        "samples": _samples(run),
    }


def _scores(folder: Path) -> dict[str, Any]:
    summary = _json(folder / "summary.json")
    return {key: summary[key] for key in ("problems", "samples", *SCORES) if key in summary} | {
        "sampling": _json(folder / "config.json").get("sampling", {}),
        "perf": {k: v for k, v in summary.get("perf", {}).items() if k != "environment"},
    }


def _gain(run: Path) -> dict[str, Any]:
    """The last evaluation of each protocol against the first, paired by problem."""
    gains = {}
    for name, (first, last) in _ends(run).items():
        found = compare(first, last)
        gains[name] = {
            "before": found.before,
            "after": found.after,
            "difference": found.difference,
            "interval": found.interval,
            "p": found.p_value,
            "problems": found.problems,
        }
    return gains


def _samples(run: Path) -> list[dict[str, Any]]:
    """Greedy answers to the first problems, before and after."""
    ends = _ends(run).get("heldout_greedy")
    if ends is None:
        return []
    before, after = ({row["id"]: row for row in read_rows(e / "results.jsonl")} for e in ends)
    problems = {row["id"]: row["problem"] for row in read_rows(ends[0] / "problems.jsonl")}
    keys = ("completion", "reward", "tokens")
    return [
        {"id": id, "problem": text, "answer": before[id]["answer"]}
        | {"before": {k: before[id][k] for k in keys}, "after": {k: after[id][k] for k in keys}}
        for id, text in list(problems.items())[:40]
        if id in before and id in after
    ]


def _ends(run: Path) -> dict[str, tuple[Path, Path]]:
    """Each protocol's first and last evaluation."""
    steps: dict[str, list[int]] = {}
    for name, step, _ in scored(run):
        steps.setdefault(name, []).append(step)
    return {
        name: (run / "eval" / f"{name}-{min(found)}", run / "eval" / f"{name}-{max(found)}")
        for name, found in steps.items()
        if len(found) > 1
    }


def draw_page() -> None:
    """docs/results.md and the pictures beside it, from every result file there is."""
    paths = sorted(RESULTS.glob("gsm8k-*.json"))
    if not paths:
        raise SystemExit(f"{RESULTS}: no gsm8k-*.json there, collect a run first")
    folder = PAGE.parent / PICTURES
    folder.mkdir(exist_ok=True)
    results = sorted((_json(path) for path in paths), key=lambda result: result["name"] != RECIPE)
    drawn = pictures(results[0])
    for name, picture in drawn.items():
        (folder / f"{results[0]['name']}-{name}.svg").write_text(picture)
    sections = [INTRODUCTION, section(results[0], list(drawn))]
    if len(results) > 1:
        sections.append(settings_tried(results))
    sections.append(resumptions(results))
    sections += [mismatch(_json(path)) for path in sorted(RESULTS.glob("mismatch-*.json"))]
    PAGE.write_text("\n".join(sections))


def settings_tried(results: list[dict[str, Any]]) -> str:
    """What the other runs had set otherwise than the first, and what they came to."""
    settings = [dict(_leaves(yaml.safe_load(result["recipe"]))) for result in results]
    rows = []
    for result, own in zip(results, settings, strict=True):
        keys = [key for key in settings[0] | own if key != "name"]
        others = {k: own.get(k) for k in keys if own.get(k) != settings[0].get(k)}
        gain = result["gain"].get("heldout", {})
        entropy = [row["entropy"] for row in result["steps"] if "entropy" in row]
        status = result["summary"].get("status", "unfinished")
        rows.append([
            result["name"],
            ", ".join(f"`{k}: {v}`" if k in own else f"no `{k}`" for k, v in others.items())
            or "the run above",
            f"{result['summary'].get('steps', 0)}{', ' + status if status != 'finished' else ''}",
            f"{_percent(gain.get('before'))} → {_percent(gain.get('after'))}",
            f"{100 * gain['difference']:+.1f}" if gain else "",
            f"{entropy[0]:.2f} → {entropy[-1]:.2f}" if entropy else "",
            f"{result['summary'].get('wall_s', 0) / 60:.1f}",
            f"{result['date']}, {result['commit']}",
        ])  # fmt: skip
    head = ["run", "set otherwise", "steps", "avg@8", "gain", "entropy", "minutes", "date, commit"]
    notes = [f"- {r['name']}: {note}\n" for r in results[1:] for note in r.get("notes", ())]
    return f"## Settings tried\n\n{table(head, rows)}\n{''.join(notes)}"


def mismatch(result: dict[str, Any]) -> str:
    """Routing replayed or not, states in fp32 or bf16; the same weights, the same prompts."""
    shape = result["shape"]
    lines = [
        [
            row["case"],
            f"{row['rollout_kl']:.1e}",
            f"{row['rollout_logprob_diff_mean']:.4f}",
            f"{row['rollout_logprob_diff_max']:.2f}",
            f"{100 * row['flip_rate']:.2f} %",
            f"{row['importance_ratio/max']:.2f}",
            f"{100 * row['correction_share']:.2f} %",
            f"{row['rewards'][0]:.3f} → {row['rewards'][-1]:.3f}",
            _percent(row.get("held_out")),
        ]
        for row in result["rows"]
    ]
    head = ["case", "KL rollout/learner", "log-prob gap, mean", "max", "flips", "largest ratio"]
    head += ["masked", "reward", f"held out, avg@{shape.get('held_out_samples', 0)}"]
    note = (
        f"{shape['steps']} steps from the cold start, {shape['prompts']} x {shape['answers']} "
        f"answers each, learning rate {shape['learning_rate']:g}; a ratio is a whole answer's; "
        f"{result['device']}, torch {result['torch']}, {result['date']}, commit "
        f"{result['commit']}, `{result['command']}`.\n"
    )
    notes = "".join(f"\n{text}\n" for text in result.get("notes", ()))
    return f"## Rollout and learner\n\n{table(head, lines)}\n{note}{notes}"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def section(result: dict[str, Any], drawn: list[str]) -> str:
    """A run: what it is of, perplexities, scores, gain, where the time went, curves, answers."""
    name, summary = result["name"], result["summary"]
    texts = list(next(iter(result["perplexity"].values()), {}))
    perplexity = [[m, *(f"{t[x]:.4g}" for x in texts)] for m, t in result["perplexity"].items()]
    parts = [
        f"## {name}\n",
        f"{result['device']}, torch {result['torch']}, {result['date']}, commit "
        f"{result['commit']}, `{result['command']}`; {summary.get('steps', 0)} steps of GRPO, "
        f"{summary.get('wall_s', 0) / 60:.1f} minutes, held-out evaluations included; "
        f"{summary.get('status', 'unfinished')}.\n",
        *(f"{note}\n" for note in result.get("notes", ())),
        table(["perplexity", *texts], perplexity) if perplexity else "",
        signal(summary),
        table(
            SCORED, [_scored(*entry) for entry in sorted(result["evaluations"].items(), key=_place)]
        )
        if result["evaluations"]
        else "",
        *(
            f"Gain of {protocol}: {100 * gain['difference']:+.1f} points, 95 % between "
            f"{100 * gain['interval'][0]:+.1f} and {100 * gain['interval'][1]:+.1f}, "
            f"{p_value(gain['p'])} (paired, {gain['problems']} problems; one training run).\n"
            for protocol, gain in result["gain"].items()
        ),
        speed(result),
        where_the_time_went(result),
        "".join(f"![{picture}]({PICTURES}/{name}-{picture}.svg)\n" for picture in drawn),
        samples(result),
    ]
    return "\n".join(part for part in parts if part)


def resumptions(results: list[dict[str, Any]]) -> str:
    """Each stop within GRPO: what the steps before and after it logged."""
    rows = []
    for result in results:
        for step in result["summary"].get("resumed_after", ()):
            around = [
                [row for row in result["steps"] if first < row["step"] <= first + 10]
                for first in (step - 10, step)
            ]
            cells = [
                " → ".join(f"{sum(row[k] for row in rs) / len(rs):.{d}f}" for rs in around if rs)
                for k, d in AROUND_A_STOP.items()
            ]
            rows.append([result["name"], f"{step}", *cells])
    head = ["run", "resumed after step", *AROUND_A_STOP]
    means = "Means of the ten steps before each stop and the ten after.\n"
    return f"## Interrupted and resumed\n\n{table(head, rows)}\n{means}" if rows else ""


def speed(result: dict[str, Any]) -> str:
    """Medians over the steps of GRPO."""
    steps = [row for row in result["steps"] if "perf/learn_s" in row]
    if not steps:
        return ""
    answers = result["summary"]["settings"]["grpo"]["num_generations"]
    sampled = [
        row["completion_length/mean"] * row["sampling/prompts"] * answers / row["perf/rollout_s"]
        for row in steps
    ]
    learned = [row["tokens"] / row["perf/learn_s"] for row in steps]
    rollout, learner = (
        statistics.median(row[f"perf/{part}_s"] for row in steps) for part in ("rollout", "learn")
    )
    return (
        f"A step took {rollout:.2f} s in rollout ({statistics.median(sampled):,.0f} sampled "
        f"tokens/s) and {learner:.2f} s in the learner ({statistics.median(learned):,.0f} "
        "tokens/s of those that it reads).\n"
    )


def where_the_time_went(result: dict[str, Any]) -> str:
    """Minutes of each stage and part of a GRPO step; `between` is what starts and saves."""
    summary, steps = result["summary"], result["steps"]
    if "stage_s" not in summary:
        return ""
    spent = dict(summary["stage_s"])
    for part in ("rollout", "learn", "publish"):
        spent[f"grpo, {part}"] = sum(row.get(f"perf/{part}_s", 0.0) for row in steps)
    spent["between"] = summary["wall_s"] - sum(spent.values())
    minutes = [f"{seconds / 60:.1f}" for seconds in spent.values()]
    return table(["minutes", *spent, "all"], [["", *minutes, f"{summary['wall_s'] / 60:.1f}"]])


def signal(summary: dict[str, Any]) -> str:
    """What the cold start could do of the training prompts, if that was measured."""
    found = summary.get("difficulty")
    if not found:
        return ""
    rates = ", ".join(f"{k} {_percent(v)}" for k, v in found.items() if k.startswith("pass@"))
    return (
        f"Before GRPO, of {found['prompts']} training prompts: {rates}; "
        f"{_percent(found['mixed'])} answered both right and wrong.\n"
    )


def _place(entry: tuple[str, Any]) -> tuple[str, int]:
    """Protocols by name, each in the order of its steps."""
    protocol, _, step = entry[0].rpartition("-")
    return (protocol, int(step)) if step.isdigit() else (entry[0], 0)


def _scored(name: str, scores: dict[str, Any]) -> list[str]:
    best = list(scores.get("pass_at", {}).items())[-1:]
    sampling = scores.get("sampling", {})
    return [
        name,
        f"{scores.get('problems')} × {scores.get('samples')}",
        ", ".join(f"{sampling[key]:g}" for key in ("temperature", "top_p") if key in sampling),
        _percent(scores.get("avg")),
        *(between(scores.get(f"ci_{kind}")) for kind in ("sampling", "bootstrap")),
        _percent(scores.get("maj")),
        "".join(f"{_percent(value)} (k = {k})" for k, value in best),
        _percent(scores.get("boxed")),
        f"{scores.get('tokens', {}).get('all', {}).get('mean') or 0:.0f}"
        + (f", {sampling['max_tokens']:,}" if sampling else ""),
        _percent(scores.get("truncated")),
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def pictures(result: dict[str, Any]) -> dict[str, str]:
    """Name -> SVG, of what the run logged."""
    imitated = [(row["step"], row["kl"]) for row in result["distill"] if "kl" in row]
    scores = [
        Scored(*_place(entry), entry[1])
        for entry in result["evaluations"].items()
        if entry[1].get("avg") is not None
    ]
    drawn = {}
    if imitated:
        drawn["distillation"] = _standalone([Curve("KL(teacher, student)", imitated)])
    for name, keys in CURVES.items():
        curves = [
            c for c in (metric_curve(key, result["steps"], scores) for key in keys) if c.points
        ]
        if curves:
            drawn[name] = _standalone(curves)
    return drawn


def samples(result: dict[str, Any]) -> str:
    """Greedy answers before and after; those that became right first."""
    turned = lambda row: row["after"]["reward"] - row["before"]["reward"]
    chosen = sorted(result["samples"], key=lambda row: turned(row) <= 0)[:SHOWN_SAMPLES]
    quote = lambda text: "\n".join(f"> {line}" for line in text.strip().splitlines())
    if not chosen:
        return ""
    better, worse = (sum(turned(row) * way > 0 for row in result["samples"]) for way in (1, -1))
    return (
        f"Greedy answers. Of the first {len(result['samples'])} test problems {better} became "
        f"right and {worse} wrong; shown are those that became right, then the first others.\n\n"
    ) + "".join(
        f"**{row['problem'].strip()}** (answer {row['answer']})\n\n"
        + "".join(
            f"{when} GRPO, {'right' if row[when]['reward'] else 'wrong'}:\n\n"
            f"{quote(row[when]['completion'])}\n\n"
            for when in ("before", "after")
        )
        for row in chosen
    )


def _standalone(curves: list[Curve]) -> str:
    head, body = draw(curves, named=True).split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{body}\n'


def _without_places(text: str) -> str:
    """Absolute paths, of whatever machine, cut to their last part."""
    return re.sub(r"(?<![\w.])(/[\w.-]+)+/", "", text)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
