"""The Markdown report: one screen, for a terminal, a pull request or a model card."""

from __future__ import annotations

from sse_eval.types import Summary
from sse_eval.words import ANCHORS, between, findings, percent, protocol, title


def markdown(summary: Summary) -> str:
    k = summary["samples"]
    most = max(map(int, summary["pass_at"]), default=1)
    lines = [
        f"# {title(summary)}",
        "",
        f"**avg@{k} {percent(summary['avg'])}** · asked again {between(summary['ci_sampling'])}"
        f" · other problems {between(summary['ci_bootstrap'])} (95 %)",
        "",
        f"{protocol(summary).capitalize()}.",
        "",
        *(f"- {'**Note:** ' * finding.warns}{finding.text}" for finding in findings(summary)),
        "",
        "| measure | value |",
        "|---|---|",
        f"| avg@{k} | {percent(summary['avg'])} |",
        *([f"| pass@{most} | {percent(summary['pass_at'][str(most)])} |"] if most > 1 else []),
        *([f"| maj@{k} | {percent(summary['maj'])} |"] if k > 1 else []),
        f"| lenient avg@{k} | {percent(summary['lenient_avg'])} |",
        *(f"| exam {name} | {percent(exam['avg'])} |" for name, exam in summary["exams"].items()),
        f"| cut off at the token limit | {percent(summary['truncated'])} |",
        f"| no box | {percent(summary['no_box'])} |",
        f"| unfinished thinking | {percent(summary['unfinished'])} |",
        f"| samples finished / missing | {summary['finished']:,} / {summary['missing']:,} |",
        *(f"| tokens, {which} | {_tokens(summary, which)} |" for which in ("right", "wrong")),
    ]
    if anchors := ANCHORS.get(summary["benchmark"]):
        lines += ["", "| published | score | source |", "|---|---|---|"]
        lines += [f"| {a.model} | {percent(a.score)} | {a.source} |" for a in anchors]
    config = summary["config"]
    data = config["benchmark"]
    lines += [
        "",
        f"Data: {data['source']}{'@' + data['revision'] if data['revision'] else ''}, "
        f"sha256 {data['sha256'][:16]}. Prompt: `{config['prompt']!r}`.",
    ]
    return "\n".join(lines) + "\n"


def _tokens(summary: Summary, which: str) -> str:
    tokens = summary["tokens"][which]
    if not tokens["count"]:
        return "–"
    return (
        f"mean {tokens['mean']:,.0f}, median {tokens['median']:,.0f}, 95th percentile "
        f"{tokens['p95']:,.0f}"
    )
