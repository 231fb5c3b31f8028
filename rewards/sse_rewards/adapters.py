"""The grader under other libraries' signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .pool import default_pool

_KIND_OF_SOURCE = ("aime", "amc", "math", "gsm8k")


def accuracy_reward(
    completions: Sequence[str | list[dict[str, Any]]],
    solution: Sequence[str] | None = None,
    *,
    answer: Sequence[str] | None = None,
    kind: str | Sequence[str] = "auto",
    **_: object,
) -> list[float | None]:
    """TRL's signature: 1.0, 0.0, or None where the gold is bad and the sample is masked.

    Args:
        completions: strings, or message lists whose last assistant message is graded.
        solution: golds, one a completion; a dataset that calls them `answer` does as well, and
            wins, since its `solution` may be worked text.
        kind: one for all, or one a completion.

    Raises:
        ValueError: neither `solution` nor `answer` is given, or their number is not that of the
            completions.
    """
    golds = answer if answer is not None else solution
    if golds is None:
        raise ValueError("accuracy_reward needs a column `answer` or `solution`")
    kinds = [kind] * len(completions) if isinstance(kind, str) else kind
    if not len(completions) == len(golds) == len(kinds):
        raise ValueError(
            f"{len(completions)} completions, {len(golds)} answers, {len(kinds)} kinds"
        )
    texts = [completion_text(completion) for completion in completions]
    items = list(zip(texts, golds, kinds, strict=True))
    return [result.reward for result in default_pool().score_batch(items)]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
) -> float:
    """verl's signature; the kind follows from the name of the data source. A bad gold is 0 here,
    since verl cannot mask a sample."""
    name = data_source.lower().rsplit("/", 1)[-1]
    kind = next((k for k in _KIND_OF_SOURCE if k in name), "auto")
    return default_pool().score(solution_str, ground_truth, kind).reward or 0.0  # pyright: ignore[reportArgumentType]


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text to grade: a string, or the last assistant message's content."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            return "".join(part.get("text", "") for part in content)
    return ""
