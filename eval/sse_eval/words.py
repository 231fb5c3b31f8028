"""What a summary says, in sentences: shared by the HTML and the Markdown report."""

from __future__ import annotations

from typing import NamedTuple

from sse_eval.types import Summary


class Anchor(NamedTuple):
    model: str
    score: float
    source: str


ANCHORS = {
    "aime24": (
        Anchor("Skywork-OR1-32B", 0.822, "avg@32, its authors"),
        Anchor("SSE-H 2B", 0.647, "arXiv 2507.16577, after RL"),
        Anchor("R1-Distill-Qwen-7B", 0.555, "pass@1 of 64, its authors"),
        Anchor("R1-Distill-Llama-8B", 0.504, "pass@1 of 64, its authors"),
        Anchor("R1-Distill-Qwen-1.5B", 0.289, "pass@1 of 64, its authors"),
    ),
    "aime25": (
        Anchor("Skywork-OR1-32B", 0.733, "avg@32, its authors"),
        Anchor("SSE-H 2B", 0.513, "arXiv 2507.16577, after RL"),
    ),
}
"""Published scores to hold a result against."""

_PUBLIC = {
    "aime24": "These problems have been public since early 2024",
    "aime25": "These problems have been public since February 2025",
}


class Finding(NamedTuple):
    text: str
    warns: bool = False


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def between(interval: list[float] | None) -> str:
    if interval is None:
        return "–"
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def title(summary: Summary) -> str:
    name = model_name(summary)
    return summary["benchmark"] + (f" · {name}" if name else "")


def model_name(summary: Summary) -> str:
    """What the caller said of the model: its name, else where it was read from."""
    return str(summary["model"].get("name") or summary["model"].get("path") or "")


def protocol(summary: Summary) -> str:
    """One line: what was asked, how."""
    sampling = summary["config"]["sampling"]
    drawn = (
        "greedy"
        if sampling["temperature"] == 0
        else f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}"
    )
    return (
        f"{count(summary['problems'], 'problem')}, {count(summary['samples'], 'sample')} each, "
        f"{drawn}, at most {sampling['max_tokens']:,} tokens, seed {sampling['seed']}"
    )


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def findings(summary: Summary) -> list[Finding]:
    """The sentences a reader needs besides the score; warnings first."""
    found = [*_warnings(summary), *_remarks(summary)]
    return sorted(found, key=lambda finding: not finding.warns)


def _warnings(summary: Summary) -> list[Finding]:
    found = []
    if summary["missing"]:
        wanted = summary["missing"] + summary["finished"]
        text = f"{summary['missing']:,} of {count(wanted, 'sample')} are missing: the score is of"
        found.append(Finding(f"{text} those there are. Run the same command to go on.", True))
    truncated = summary["truncated"] or 0
    if truncated >= 0.05:
        limit = f"{summary['config']['sampling']['max_tokens']:,} tokens"
        text = f"{percent(truncated)} of the answers were cut off at {limit}"
        found.append(Finding(f"{text}: a higher limit may raise the score.", True))
    strict, lenient = summary["avg"], summary["lenient_avg"]
    if strict is not None and lenient is not None and lenient - strict >= 0.01:
        text = f"Counting answers outside a box the score would be {percent(lenient)}"
        found.append(Finding(f"{text}: the model often skips the box.", True))
    if summary["timeouts"]:
        found.append(Finding(f"{percent(summary['timeouts'])} of the checks timed out.", True))
    if summary["suspects"]:
        text = f"{count(len(summary['suspects']), 'sample')} scored 0 may deserve a look"
        found.append(Finding(f"{text} (Suspects, below).", True))
    return found


def _remarks(summary: Summary) -> list[Finding]:
    found = []
    most = max(map(int, summary["pass_at"]), default=0)
    if summary["avg"] == 0:
        found.append(Finding(f"None of {count(summary['finished'], 'answer')} is right."))
    elif most > 1 and summary["maj"] is not None:
        text = (
            f"With {most} tries it solves {percent(summary['pass_at'][str(most)])} of the problems"
        )
        found.append(
            Finding(f"{text}; the majority answer is right for {percent(summary['maj'])}.")
        )
    right, wrong = (summary["tokens"][which]["median"] for which in ("right", "wrong"))
    if right and wrong:
        text = f"A right answer takes {right:,.0f} tokens in the median, a wrong one {wrong:,.0f}"
        found.append(Finding(f"{text}."))
    if summary["no_box"]:
        found.append(Finding(f"{percent(summary['no_box'])} of the answers have no box."))
    if summary["unfinished"]:
        text = f"{percent(summary['unfinished'])} of the answers never left their thinking."
        found.append(Finding(text))
    if public := _PUBLIC.get(summary["benchmark"]):
        found.append(
            Finding(f"{public}: newer models may have read them; aime26 is the cleaner test.")
        )
    return found
