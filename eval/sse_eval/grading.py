"""From a sample to its row in results.jsonl, and the same row graded again."""

from __future__ import annotations

from sse_rewards import RewardPool

from sse_eval.folder import Row
from sse_eval.types import Problem, SampleOutput, SampleRequest


def graded_row(
    pool: RewardPool, problem: Problem, request: SampleRequest, output: SampleOutput
) -> tuple[Row, float]:
    """The row of a sample, and the milliseconds that grading took (which are not part of it)."""
    row: Row = {
        "id": output.id,
        "sample": output.sample,
        "seed": request.seed,
        "answer": problem.answer,
        "kind": problem.kind,
        "prompt": output.prompt,
        "completion": output.completion,
        "tokens": output.tokens,
        "finish_reason": output.finish_reason,
        "cuts": {
            str(budget): output.cuts.get(budget, 0)
            for budget in request.budgets
            if budget < output.tokens
        },
    }
    return regraded_row(pool, row)


def regraded_row(pool: RewardPool, row: Row) -> tuple[Row, float]:
    """A row with its verdict fields computed from its own text."""
    answer, kind = row["answer"], row["kind"]
    # A template that opens the thinking in the prompt leaves it to the answer to close it.
    opened = "<think>" if row["prompt"].rstrip().endswith("<think>") else ""
    text = opened + row["completion"]
    result = pool.score(text, answer, kind)
    lenient = pool.score(text, answer, kind, lenient=True)
    verdict = {
        "extracted": result.extracted,
        "reward": result.reward,
        "status": result.status,
        "reason": result.reason,
        "lenient_reward": lenient.reward,
        "budget_rewards": {
            budget: pool.score(text[: len(opened) + end], answer, kind).reward if end else 0.0
            for budget, end in row["cuts"].items()
        },
    }
    return row | verdict, result.ms
