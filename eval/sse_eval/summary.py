"""From rows to the summary: every number that the report, the CLI and a run's summary show."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sse_eval import statistics
from sse_eval.folder import Row
from sse_eval.types import Problem, Summary


def summary_of(
    rows: Sequence[Row],
    config: Mapping[str, Any],
    *,
    problems: Sequence[Problem],
    perf: Mapping[str, Any],
) -> Summary:
    """The summary of the rows there are; problems without rows count as missing samples."""
    samples = config["sampling"]["samples"]
    by_id: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_id[row["id"]].append(row)
    scores = [rewards(group) for group in by_id.values()]
    fewest = min(map(len, scores), default=0)
    sampling = statistics.sampling_interval(scores) if scores else None
    bootstrap = (
        statistics.bootstrap_interval(np.array([s.mean() for s in scores])) if scores else None
    )
    return Summary(
        benchmark=config["benchmark"]["name"],
        problems=len(problems),
        samples=samples,
        finished=len(rows),
        missing=len(problems) * samples - len(rows),
        avg=statistics.average(scores) if scores else None,
        ci_sampling=list(sampling) if sampling else None,
        ci_bootstrap=list(bootstrap) if bootstrap else None,
        pass_at={str(k): statistics.pass_at(scores, k) for k in _curve(fewest)},
        maj=_majority(by_id) if scores else None,
        lenient_avg=_mean_of_problems(by_id, "lenient_reward"),
        boxed=_rate(rows, lambda row: row["status"] not in UNBOXED),
        no_box=_rate(rows, lambda row: row["status"] == "no_box"),
        truncated=_rate(rows, lambda row: row["finish_reason"] == "length"),
        unfinished=_rate(rows, lambda row: row["status"] == "unfinished_thinking"),
        timeouts=_rate(rows, lambda row: row["status"] == "timeout"),
        statuses=dict(Counter(row["status"] for row in rows).most_common()),
        tokens={
            "all": _tokens(rows),
            "right": _tokens([row for row in rows if row["reward"]]),
            "wrong": _tokens([row for row in rows if not row["reward"]]),
        },
        exams=_exams(by_id, {problem.id: problem.exam for problem in problems}),
        lengths=_lengths(rows),
        budgets=_budgets(by_id, config["sampling"]["max_tokens"]),
        suspects=_suspects(rows),
        model=dict(config["model"]),
        config=dict(config),
        perf=dict(perf),
    )


UNBOXED = frozenset({"no_box", "empty_box", "truncated", "unfinished_thinking"})
"""Statuses of a sample without an answer in a closed box."""


def rewards(rows: Sequence[Row], key: str = "reward") -> np.ndarray:
    """Scores of a problem's rows, [samples]; a gold that cannot be used is refused at load."""
    return np.array([row[key] or 0.0 for row in rows])


def vote(row: Row) -> str | None:
    """What a row votes for: the right answer however written, else its box without spaces."""
    if row["reward"]:
        return row["answer"]
    if row["status"] in UNBOXED or row["extracted"] is None:
        return None
    return "".join(row["extracted"].split())


def _majority(by_id: Mapping[str, Sequence[Row]]) -> float:
    return statistics.majority(
        [[vote(row) for row in group] for group in by_id.values()],
        [group[0]["answer"] for group in by_id.values()],
    )


def _curve(samples: int) -> list[int]:
    """1, 2, 4, ... and `samples` itself."""
    doubling = [2**i for i in range(samples.bit_length())]
    return sorted({k for k in [*doubling, samples] if 1 <= k <= samples})


def _mean_of_problems(by_id: Mapping[str, Sequence[Row]], key: str) -> float | None:
    return (
        float(np.mean([rewards(group, key).mean() for group in by_id.values()])) if by_id else None
    )


def _rate(rows: Sequence[Row], counts: Any) -> float | None:
    return sum(map(counts, rows)) / len(rows) if rows else None


def _tokens(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {"count": 0, "mean": None, "median": None, "p95": None, "total": 0}
    tokens = np.array([row["tokens"] for row in rows])
    return {
        "count": len(rows),
        "mean": float(tokens.mean()),
        "median": float(np.median(tokens)),
        "p95": float(np.quantile(tokens, 0.95)),
        "total": int(tokens.sum()),
    }


def _exams(by_id: Mapping[str, Sequence[Row]], exams: Mapping[str, str]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for exam in sorted({exam for exam in exams.values() if exam}):
        scores = [rewards(group) for id, group in by_id.items() if exams[id] == exam]
        parts[exam] = {
            "problems": sum(other == exam for other in exams.values()),
            "avg": statistics.average(scores) if scores else None,
        }
    return parts


def _lengths(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Buckets low < tokens <= high that double, at most six: the first holds all shorter ones."""
    if not rows:
        return []
    top = max(1, max(row["tokens"] for row in rows) - 1).bit_length()
    edges = [0, *(2**i for i in range(max(0, top - 5), top + 1))]
    buckets = []
    for low, high in pairwise(edges):
        inside = [row for row in rows if low < row["tokens"] <= high]
        if inside:
            avg = float(rewards(inside).mean())
            buckets.append({"low": low, "high": high, "samples": len(inside), "avg": avg})
    return buckets


def budgets_of(max_tokens: int) -> tuple[int, ...]:
    """Token limits below max_tokens to recompute accuracy at: an eighth, a quarter, a half."""
    return tuple(sorted({max_tokens // part for part in (8, 4, 2)} - {0, max_tokens}))


def _budgets(by_id: Mapping[str, Sequence[Row]], max_tokens: int) -> list[dict[str, Any]]:
    curve = []
    for budget in (*budgets_of(max_tokens), max_tokens) if by_id else ():
        scores = [
            np.array(
                [row["budget_rewards"].get(str(budget), row["reward"]) or 0.0 for row in group]
            )
            for group in by_id.values()
        ]
        curve.append({"tokens": budget, "avg": statistics.average(scores)})
    return curve


def _suspects(rows: Sequence[Row], most: int = 50) -> list[dict[str, Any]]:
    """Samples scored 0 whose last words hold the gold: a grader's slip, or luck."""
    found = [
        {key: row[key] for key in ("id", "sample", "extracted", "answer")} | {"why": why}
        for row in rows
        if not row["reward"] and (why := _suspicion(row))
    ]
    return found[:most]


def _suspicion(row: Row) -> str:
    if row["status"] in ("timeout", "error", "unparseable"):
        return f"the grader ended with {row['status']}"
    if row["lenient_reward"]:
        return "right, but outside a box"
    if row["status"] in UNBOXED and _holds(row["completion"][-200:], row["answer"]):
        return "the answer is among the last words, outside a box"
    if _holds(row["extracted"] or "", row["answer"]):
        return "the box holds the answer and something else"
    return ""


def _holds(text: str, gold: str) -> bool:
    """Whether the gold stands in the text as a word of its own; one character proves nothing."""
    return len(gold) > 1 and bool(re.search(rf"(?<![\w.]){re.escape(gold)}(?!\.?\w)", text))
