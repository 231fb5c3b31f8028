"""The HTML report: one file that needs nothing else, and gives the answer on the first screen."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from sse_eval import pictures
from sse_eval.folder import Row, replace
from sse_eval.markdown import markdown
from sse_eval.transcripts import cut, problems_html, shown_text
from sse_eval.types import Problem, Summary
from sse_eval.words import ANCHORS, between, count, findings, model_name, percent, protocol, title


def write_report(
    folder: Path, summary: Summary, problems: Sequence[Problem], rows: Sequence[Row]
) -> None:
    """Write report.html and report.md into an evaluation's folder."""
    replace(folder / "report.md", markdown(summary).encode(errors="replace"))
    replace(folder / "report.html", html(summary, problems, rows).encode(errors="replace"))


def html(summary: Summary, problems: Sequence[Problem], rows: Sequence[Row]) -> str:
    """The page: no script, no address, light and dark, wide and narrow."""
    templates = files("sse_eval") / "templates"
    return Template((templates / "report.html").read_text()).substitute(
        style=(templates / "report.css").read_text(),
        title=shown_text(title(summary)),
        protocol=shown_text(protocol(summary)),
        score=percent(summary["avg"]),
        score_name=_score_name(summary),
        intervals=_intervals(summary),
        standing=_standing(summary),
        standing_caption=_standing_caption(summary),
        findings="".join(
            f"<li{' class=warns' * finding.warns}>{shown_text(finding.text)}</li>"
            for finding in findings(summary)
        ),
        tiles=_tiles(summary),
        pictures=_pictures(summary, problems, rows),
        tables=_exams(summary) + _suspects(summary),
        problems_note=_problems_note(summary),
        problems=problems_html(problems, rows),
        measured=_measured(summary),
    )


def _score_name(summary: Summary) -> str:
    if summary["samples"] == 1:
        return "right answers, one sample of each problem"
    return f"avg@{summary['samples']}: mean share of right answers"


def _intervals(summary: Summary) -> str:
    entries = [
        ("same problems asked again", summary["ci_sampling"]),
        ("other problems of this kind", summary["ci_bootstrap"]),
    ]
    return "".join(
        f"<dt>{name}</dt><dd>{between(interval)}</dd>" for name, interval in entries if interval
    )


def _standing(summary: Summary) -> str:
    anchors = [pictures.Mark(a.model, a.score) for a in ANCHORS.get(summary["benchmark"], ())]
    if summary["avg"] is not None:
        own = pictures.Mark(
            model_name(summary) or "this model",
            summary["avg"],
            summary["ci_sampling"],
            summary["ci_bootstrap"],
            own=True,
        )
        anchors.append(own)
    return pictures.standing(sorted(anchors, key=lambda mark: -mark.score))


def _standing_caption(summary: Summary) -> str:
    text = "Percent. Bands are 95 %: inner, the same problems asked again; outer, other problems."
    if anchors := ANCHORS.get(summary["benchmark"]):
        sources = "; ".join(f"{a.model}: {a.source}" for a in anchors)
        return f"{text} <span title='{shown_text(sources)}'>Grey: published scores.</span>"
    return text


def _tiles(summary: Summary) -> str:
    k, most = summary["samples"], max(map(int, summary["pass_at"]), default=1)
    tiles = []
    if most > 1:
        tiles.append(
            (percent(summary["pass_at"][str(most)]), f"solved in {most} tries (pass@{most})")
        )
        tiles.append((percent(summary["maj"]), f"majority of {k} (maj@{k})"))
    tiles += [
        (percent(summary["truncated"]), "cut off at the limit"),
        (percent(summary["no_box"]), "without a box"),
        (percent(summary["lenient_avg"]), "score if boxes were optional"),
    ]
    if median := summary["tokens"]["all"]["median"]:
        tiles.append((f"{median:,.0f}", "tokens, median answer"))
    if speed := summary["perf"].get("tokens_per_s"):
        tiles.append((f"{speed:,.0f}", "tokens a second"))
    if (hours := summary["perf"].get("gpu_hours", 0)) >= 0.005:
        tiles.append((f"{hours:,.2f}", "GPU hours"))
    return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in tiles)


def _pictures(summary: Summary, problems: Sequence[Problem], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    charts = [("Problem by problem", *_by_problem(problems, rows))]
    if len(summary["pass_at"]) > 1:
        points = [(k, score) for k, score in summary["pass_at"].items()]
        chart = pictures.curve(points, "pass@k by k")
        charts.append(("pass@k", chart, "Percent of problems solved at least once in k tries."))
    if len(summary["budgets"]) > 1:
        points = [(_tokens(point["tokens"]), point["avg"]) for point in summary["budgets"]]
        chart = pictures.curve(points, "score by token limit")
        charts.append(
            ("Score by token limit", chart, "Percent, every answer cut at that many tokens.")
        )
    chart = pictures.bars(_by_length(summary), "right and wrong by answer length")
    text = "Answers by tokens; blue right, ochre wrong, share of right above."
    charts.append(("Right and wrong by length", chart, text))
    return "".join(
        f"<figure><h3>{name}</h3>{chart}<figcaption>{caption}</figcaption></figure>"
        for name, chart, caption in charts
    )


def _by_problem(problems: Sequence[Problem], rows: Sequence[Row]) -> tuple[str, str]:
    """A column a problem; for more than 60, how many problems are solved how often."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        rewards[row["id"]].append(row["reward"] or 0.0)
    rates = [(p.id, sum(r) / len(r)) for p in problems if (r := rewards.get(p.id))]
    if len(rates) <= 60:
        text = "Share of right answers, in the benchmark's order; the first problem is leftmost."
        return pictures.columns(rates, "share of right answers by problem"), text
    groups = {
        "never": [rate for _, rate in rates if rate == 0],
        "up to half": [rate for _, rate in rates if 0 < rate <= 0.5],
        "over half": [rate for _, rate in rates if 0.5 < rate < 1],
        "always": [rate for _, rate in rates if rate == 1],
    }
    bars = [pictures.Bar(name, len(group), 0, f"{len(group):,}") for name, group in groups.items()]
    chart = pictures.bars(bars, "problems by share of right answers")
    return chart, "Problems by how often they were solved."


def _by_length(summary: Summary) -> list[pictures.Bar]:
    bars = []
    for bucket in summary["lengths"]:
        right = round(bucket["avg"] * bucket["samples"])
        name = f"≤ {_tokens(bucket['high'])}"
        note = percent(bucket["avg"], 0)
        bars.append(pictures.Bar(name, right, bucket["samples"] - right, note))
    return bars


def _exams(summary: Summary) -> str:
    if not summary["exams"]:
        return ""
    rows = "".join(
        f"<tr><td>{shown_text(name)}</td><td class=number>{exam['problems']}</td>"
        f"<td class=number>{percent(exam['avg'])}</td></tr>"
        for name, exam in summary["exams"].items()
    )
    head = "<tr><th>exam</th><th class=number>problems</th><th class=number>score</th></tr>"
    return f"<section><h2>Exams</h2><table>{head}{rows}</table></section>"


def _suspects(summary: Summary) -> str:
    if not summary["suspects"]:
        return ""
    rows = "".join(
        f"<tr><td>{shown_text(s['id'])}</td><td class=number>{s['sample']}</td>"
        f"<td>{shown_text(s['why'])}</td><td>{shown_text(cut(s['extracted'] or '–', 60))}</td>"
        f"<td>{shown_text(s['answer'])}</td></tr>"
        for s in summary["suspects"]
    )
    head = (
        "<tr><th>problem</th><th class=number>sample</th><th>why</th><th>box</th><th>gold</th></tr>"
    )
    return (
        "<section><h2>Suspects</h2><p class=quiet>Scored 0, but near enough to deserve a look.</p>"
        f"<div class=scroll><table>{head}{rows}</table></div></section>"
    )


def _problems_note(summary: Summary) -> str:
    finished = count(summary["finished"], "sample")
    return (
        f"{finished}. Unfold a problem to read it and its answers; "
        "long answers are shortened here, whole in results.jsonl."
    )


def _measured(summary: Summary) -> str:
    shown = {"statuses": summary["statuses"], "tokens": summary["tokens"], "perf": summary["perf"]}
    return "".join(
        f"<h3>{name}</h3><pre>{shown_text(text)}</pre>"
        for name, text in (
            ("Prompt", summary["config"]["prompt"]),
            ("Configuration", _json(summary["config"])),
            ("Verdicts, tokens, machine", _json(shown)),
        )
    )


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _tokens(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else f"{number:,}"
