"""What the grader says about one answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["auto", "aime", "math"]
Status = Literal[
    "correct",
    "wrong",
    "no_box",
    "empty_box",
    "truncated",
    "unfinished_thinking",
    "unparseable",
    "timeout",
    "error",
    "bad_gold",
]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, slots=True)
class Result:
    """One graded answer. Equality ignores `ms`, the only field that depends on a clock.

    Example: `score(r"so \\boxed{204}.", "204")` is
    `Result(reward=1.0, correct=True, extracted="204", status="correct", stage="integer", ...)`.
    """

    reward: float | None
    """1.0 or 0.0; None only for `bad_gold`: mask this sample."""
    correct: bool
    extracted: str | None
    """Text of the last box, trimmed; None where there is none."""
    status: Status
    """`truncated` means that the last box is never closed."""
    reason: str = ""
    """Why, in words."""
    stage: str = ""
    """Who decided: zone, box, limits, integer, text, exact, guard, symbolic, gold or deadline."""
    ms: float = field(default=0.0, compare=False)
    """Wall time of the decision in milliseconds."""
