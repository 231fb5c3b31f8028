"""An evaluation's samples in the per-sample log shapes of lm-evaluation-harness and lighteval."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sse_eval.folder import EvaluationError, Row, read_config, read_rows, write_rows

FORMATS = ("lm-eval", "lighteval")


def export_logs(folder: Path | str, formats: Sequence[str]) -> list[Path]:
    """Write an evaluation's samples into its folder in each of FORMATS that is named; the files.

    Raises EvaluationError for another format or if the folder has no results.
    """
    check_formats(formats)
    folder = Path(folder)
    name = read_config(folder)["benchmark"]["name"]
    files = {"lm-eval": f"samples_{name}.jsonl", "lighteval": f"details_{name}.parquet"}
    for format in formats:
        export = export_lm_eval if format == "lm-eval" else export_lighteval
        export(folder, folder / files[format])
    return [folder / files[format] for format in formats]


def check_formats(formats: Sequence[str]) -> None:
    """Raises EvaluationError for a format that is none of FORMATS."""
    for format in formats:
        if format not in FORMATS:
            raise EvaluationError(f"no log format {format!r}: give {' or '.join(FORMATS)}")


def export_lm_eval(folder: Path | str, file: Path | str) -> int:
    """Write `samples_<task>.jsonl` as `lm_eval --log_samples` does, a line for each problem.

    `resps` holds all its samples, `filtered_resps` their boxes, `exact_match` their mean score.
    Returns the number of lines. Raises EvaluationError if the folder has no results.
    """
    config, problems = _load(Path(folder))
    sampling = config["sampling"]
    arguments = {
        "until": [],
        "do_sample": sampling["temperature"] > 0,
        "temperature": sampling["temperature"],
        "top_p": sampling["top_p"],
        "max_gen_toks": sampling["max_tokens"],
    }
    lines = [
        {
            "doc_id": number,
            "doc": doc,
            "target": doc["answer"],
            "arguments": {"gen_args_0": {"arg_0": rows[0]["prompt"], "arg_1": arguments}},
            "resps": [[row["completion"] for row in rows]],
            "filtered_resps": [row["extracted"] or "" for row in rows],
            "filter": "boxed",
            "metrics": ["exact_match"],
            "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
            "prompt_hash": _sha256(rows[0]["prompt"]),
            "target_hash": _sha256(doc["answer"]),
            "exact_match": _mean(rows),
        }
        for number, (doc, rows) in enumerate(problems)
    ]
    write_rows(Path(file), lines)
    return len(lines)


def export_lighteval(folder: Path | str, file: Path | str) -> int:
    """Write `details_<task>.parquet` as lighteval saves its details (columns doc, metric and
    model_response), a row for each problem.

    Returns the number of rows. Raises EvaluationError if the folder has no results.
    """
    import pyarrow
    import pyarrow.parquet

    config, problems = _load(Path(folder))
    name = config["benchmark"]["name"]
    sampling = config["sampling"]
    rows = [
        {
            "doc": {
                "id": doc["id"],
                "task_name": name,
                "query": rows[0]["prompt"],
                "choices": [doc["answer"]],
                "gold_index": [0],
                "generation_size": sampling["max_tokens"],
                "num_samples": sampling["samples"],
                "specific": {"problem": doc["problem"]},
            },
            "metric": {f"avg@{sampling['samples']}": _mean(rows)},
            "model_response": {
                "input": rows[0]["prompt"],
                "text": [row["completion"] for row in rows],
                "text_post_processed": [row["extracted"] or "" for row in rows],
            },
        }
        for doc, rows in problems
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_sound(rows)), str(file))
    return len(rows)


def _load(folder: Path) -> tuple[dict[str, Any], list[tuple[dict[str, Any], list[Row]]]]:
    """The configuration, and each problem that has samples with them."""
    config = read_config(folder)
    by_id: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(read_rows(folder / "results.jsonl"), key=lambda row: row["sample"]):
        by_id[row["id"]].append(row)
    docs = read_rows(folder / "problems.jsonl")
    if not by_id:
        raise EvaluationError(f"{folder} has no results to export")
    return config, [(doc, by_id[doc["id"]]) for doc in docs if doc["id"] in by_id]


def _mean(rows: Sequence[Row]) -> float:
    return sum(row["reward"] or 0.0 for row in rows) / len(rows)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _sound(value: Any) -> Any:
    """Parquet's text is UTF-8 and has no lone surrogates."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {key: _sound(inner) for key, inner in value.items()}
    return [_sound(inner) for inner in value] if isinstance(value, list) else value
