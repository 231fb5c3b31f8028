"""The problems of a report: how each went, and what the model wrote, as far as a page can hold."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape

from sse_eval.folder import Row
from sse_eval.summary import vote
from sse_eval.types import Problem

PAGE = 4_000_000
"""Characters of transcripts in one page; phones open it without pain."""
SHORTEST = 1_500
"""Characters a transcript keeps at least: its beginning and its end."""

_UNSHOWN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def problems_html(problems: Sequence[Problem], rows: Sequence[Row]) -> str:
    """One foldable line a problem, in the benchmark's order, with its samples inside.

    Each sample names its line in results.jsonl, where the whole text is.
    """
    by_id: dict[str, list[Row]] = defaultdict(list)
    lines: dict[tuple[str, int], int] = {}
    for line, row in enumerate(rows, 1):
        by_id[row["id"]].append(row)
        lines[row["id"], row["sample"]] = line
    shown, length = _share(problems, rows)
    head = (
        '<div class="head"><span>problem</span><span>right</span><span></span>'
        "<span>gold</span><span>answers</span></div>"
    )
    return head + "".join(
        _problem(problem, by_id[problem.id], lines, shown, length) for problem in problems
    )


def shown_text(text: str) -> str:
    """Text for HTML: escaped, what no browser accepts replaced by U+FFFD."""
    return escape(_UNSHOWN.sub("\ufffd", text))


def cut(text: str, length: int) -> str:
    """At most `length` characters: a third from the beginning, the rest from the end."""
    if len(text) <= length:
        return text
    gone = f" … {len(text) - length:,} characters … " if length > 200 else "…"
    return text[: length // 3] + gone + text[len(text) - length + length // 3 :]


def _share(problems: Sequence[Problem], rows: Sequence[Row]) -> tuple[int, int]:
    """Samples shown of each problem, and characters of each, so that the page stays below PAGE."""
    samples = -(-len(rows) // max(1, len(problems)))
    if sum(len(row["completion"]) for row in rows) <= PAGE:
        return samples, PAGE
    shown = min(samples, max(1, PAGE // (SHORTEST * len(problems))))
    return shown, max(SHORTEST // 3, PAGE // (shown * len(problems)))


def _problem(
    problem: Problem,
    rows: Sequence[Row],
    lines: Mapping[tuple[str, int], int],
    shown: int,
    length: int,
) -> str:
    right = sum(bool(row["reward"]) for row in rows)
    rate = right / len(rows) if rows else 0.0
    rows = sorted(rows, key=lambda row: row["sample"])
    if len(rows) > shown:  # one of each verdict first
        first = {bool(row["reward"]): row["sample"] for row in rows[::-1]}
        rows = sorted(rows, key=lambda row: (row["sample"] not in first.values(), row["sample"]))
    inside = "".join(_sample(row, lines[row["id"], row["sample"]], length) for row in rows[:shown])
    return (
        f'<details class="problem"><summary><span>{shown_text(problem.id)}</span>'
        f'<span class="bar"><i style="width:{100 * rate:.0f}%"></i></span>'
        f"<span>{right}/{len(rows)}</span>"
        f'<span class="gold">{shown_text(problem.answer)}</span>'
        f'<span class="votes">{_votes(problem, rows)}</span></summary>'
        f"<pre>{shown_text(problem.problem)}</pre>{inside}</details>"
    )


def _votes(problem: Problem, rows: Sequence[Row]) -> str:
    counts = Counter(vote(row) for row in rows)
    none = counts.pop(None, 0)
    votes = [
        f"{'<b>' if answer == problem.answer else ''}{shown_text(cut(str(answer), 24))}"
        f"{'</b>' if answer == problem.answer else ''} ×{n}"
        for answer, n in counts.most_common(4)
    ]
    if len(counts) > 4:
        votes.append(f"{len(counts) - 4} more")
    if none:
        votes.append(f"none ×{none}")
    return ", ".join(votes)


def _sample(row: Row, line: int, length: int) -> str:
    verdict = "ok" if row["reward"] else "no"
    box = f" · {shown_text(cut(row['extracted'], 60))}" if row["extracted"] else ""
    return (
        f'<details class="sample"><summary><span class="{verdict}">{escape(row["status"])}</span>'
        f" · sample {row['sample']} · {row['tokens']:,} tokens{box}"
        f' <span class="votes">results.jsonl line {line}</span></summary>'
        f"<pre>{shown_text(cut(row['completion'], length))}</pre></details>"
    )
