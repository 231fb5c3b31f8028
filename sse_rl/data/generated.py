"""Tasks that reasoning-gym generates."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from sse_rl.errors import UserError


def generate(task: str, args: dict[str, Any], *, size: int, seed: int) -> list[dict[str, Any]]:
    """`size` items of `task` as {question, answer, columns}, repeated questions dropped.

    The library draws item i from `seed + i`, so runs with neighbouring seeds share items: generate
    once, then split by text. `columns` holds an id and the item's metadata, such as `expression`.

    Raises:
        UserError: the task or one of its arguments is unknown, or a value does not suit it.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(
            f"task = {task}: reasoning-gym has no such task{_guess(task, list(DATASETS))}"
        )
    config = DATASETS[task][1]
    known = [item.name for item in dataclasses.fields(config) if item.name not in ("seed", "size")]
    for name in args:
        if name not in known:
            raise UserError(f"task_args.{name}: {task} has no such argument{_guess(name, known)}")
    try:
        items = reasoning_gym.create_dataset(task, size=size, seed=seed, **args)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"task_args: {task} refuses {args}: {error}") from None
    rows: dict[str, dict[str, Any]] = {}
    for index, item in enumerate(items):
        columns = {
            key: value
            for key, value in item["metadata"].items()
            if isinstance(value, str | int | float)
        }
        rows.setdefault(
            item["question"],
            {
                "question": item["question"],
                "answer": str(item["answer"]),
                "columns": {**columns, "id": f"{task}-{index}"},
            },
        )
    return list(rows.values())


def _guess(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
