"""The tables of docs/conversion.md, from the result files of benchmarks/alignment.py and
benchmarks/conversion.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_table import table

RESULTS = Path(__file__).parent / "results"


def alignment() -> str:
    """What is left of each layer's error after the last epoch."""
    result = _result("alignment")
    layers = list(result["rows"][0]["errors"])
    lines = [
        [row["case"], f"{row['learning_rate']:g}", *(f"{row['errors'][i][-1]:.3f}" for i in layers)]
        for row in result["rows"]
    ]
    head = ["converted layer", "learning rate", *(f"layer {i}" for i in layers)]
    return table(head, lines) + _note(result, f"{result['tokens']:,} tokens, one row a step")


def order() -> str:
    """The divergence that is left with the first 0, 1, 2, ... layers kept."""
    result = _result("conversion")
    lines = [
        [str(kept), "" if row["layer"] is None else str(row["layer"]), f"{row['kl']:.3f}"]
        for kept, row in enumerate(result["order"])
    ]
    head = ["layers kept", "the last of them", "KL(teacher, student), nats a token"]
    measured = f"aligned on rows of {result['tokens_a_step']:,} tokens a step, measured on "
    return table(head, lines) + _note(result, f"{measured}{result['kl_tokens']:,} tokens")


def _result(name: str) -> dict[str, Any]:
    """The one on the fastest device there is: a CPU's only where there is no other."""
    paths = sorted(RESULTS.glob(f"{name}-*.json"), key=lambda path: path.stem.endswith("-cpu"))
    return json.loads(paths[0].read_text())


def _note(result: dict[str, Any], measured: str) -> str:
    return (
        f"\n{measured}; {result['device']}, torch {result['torch']}, {result['date']}, "
        f"commit {result['commit']}, `{result['command']}`.\n"
    )


TABLES: dict[str, Any] = {"alignment": alignment, "order": order}
