"""Counts of what the grader decided, where and how fast."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Any

from .result import STATUSES, Result

RECENT = 20_000
"""Timings kept for the percentiles."""
TAIL = 200
"""A gold within this many last characters of a text that scored 0 makes it a suspect."""
EXAMPLES = 20


class Telemetry:
    """Thread-safe counters of one pool."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: Counter[str] = Counter()
        self._stage: Counter[str] = Counter()
        self._ms: deque[float] = deque(maxlen=RECENT)
        self._max_ms = 0.0
        self._suspects = 0
        self._examples: deque[dict[str, str]] = deque(maxlen=EXAMPLES)

    def record(self, completion: object, answer: object, result: Result) -> None:
        suspect = result.reward == 0 and is_false_zero_suspect(completion, answer)
        with self._lock:
            self._status[result.status] += 1
            self._stage[result.stage] += 1
            self._ms.append(result.ms)
            self._max_ms = max(self._max_ms, result.ms)
            if suspect:
                self._suspects += 1
                self._examples.append(
                    {
                        "answer": str(answer),
                        "extracted": result.extracted or "",
                        "status": result.status,
                        "tail": str(completion)[-TAIL:],
                    }
                )

    def summary(self) -> dict[str, Any]:
        """`status` counts, `stage_share` (fractions of all), `ms` p50, p99 and max, suspects."""
        with self._lock:
            total = sum(self._status.values())
            ms = sorted(self._ms)
            return {
                "total": total,
                "status": {status: self._status[status] for status in STATUSES},
                "stage_share": {k: n / total for k, n in sorted(self._stage.items())},
                "ms": {
                    "p50": ms[len(ms) // 2] if ms else 0.0,
                    "p99": ms[min(len(ms) - 1, len(ms) * 99 // 100)] if ms else 0.0,
                    "max": self._max_ms,
                },
                "false_zero_suspects": self._suspects,
                "suspects": list(self._examples),
            }


def is_false_zero_suspect(completion: object, answer: object) -> bool:
    """Whether the gold's text stands in the last characters of the completion."""
    if not isinstance(completion, str):
        return False
    gold = str(answer).strip()
    return bool(gold) and gold in completion[-TAIL:]
