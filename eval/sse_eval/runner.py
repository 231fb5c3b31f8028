"""Run an evaluation: every sample once, each on disk as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import GeneratorType
from typing import Any

from sse_rewards import RewardPool

from sse_eval.benchmarks import load_benchmark
from sse_eval.environment import environment
from sse_eval.folder import (
    EvaluationError,
    Folder,
    Row,
    open_folder,
    read_config,
    read_rows,
    replace,
    write_rows,
)
from sse_eval.grading import graded_row, regraded_row
from sse_eval.prompts import PROMPT
from sse_eval.report import write_report
from sse_eval.seeds import sample_seed
from sse_eval.summary import budgets_of, summary_of
from sse_eval.types import Benchmark, Generator, Problem, SampleRequest, Summary


def evaluate(
    benchmark: Benchmark | str | Path,
    generator: Generator,
    out_dir: Path | str,
    *,
    samples: int = 32,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 32768,
    seed: int = 0,
    prompt: str = PROMPT,
    model: Mapping[str, Any] | None = None,
    limit: int | None = None,
    pool: RewardPool | None = None,
    gpus: int = 0,
    progress: Callable[[int, int, Row], None] | None = None,
) -> Summary:
    """Ask each problem `samples` times, grade, and write the folder: results.jsonl, summary.json,
    report.html, report.md, config.json, timings.jsonl.

    Resumes: finished samples are kept as they are, the others are asked for. The finished
    results.jsonl has the same bytes however often the run was killed.

    prompt: a template, `{problem}` its only placeholder. model: what identifies the weights (name,
    checkpoint's hash, step); part of the configuration that a resume must repeat. pool: one to
    share; else one is started for the call. gpus: how many the generator uses, for the GPU hours of
    the report. progress: called with (finished, wanted, row) after each row.

    Raises ValueError for bad arguments or benchmark, EvaluationError for a folder of another
    configuration, a context too short or a full disk; what the generator raises passes through.
    In each case finished samples are safe, and the same call goes on from there.
    """
    _check(samples, temperature, top_p, max_tokens, prompt)
    _check_context(generator, max_tokens)
    bench = (
        benchmark if isinstance(benchmark, Benchmark) else load_benchmark(benchmark, limit=limit)
    )
    wanted = requests_of(
        bench,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        prompt=prompt,
    )
    sampling = {
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    messages = {request.id: request.messages for request in wanted}
    prompts = {id: generator.render(asked) for id, asked in messages.items()}
    config = config_of(bench, sampling, prompt, prompts, model or {})
    with open_folder(Path(out_dir), config) as folder:
        write_rows(folder.path / "problems.jsonl", (asdict(problem) for problem in bench.problems))
        done = {(row["id"], row["sample"]) for row in folder.rows}
        todo = [request for request in wanted if (request.id, request.sample) not in done]
        if todo:
            folder.note(
                {"event": "start", "at": time.time(), "gpus": gpus, "environment": environment()}
            )
            with _grader(pool) as grader:
                _run(bench, generator, grader, folder, todo, progress)
        if len(folder.rows) == len(wanted):
            folder.finish()
    return summarize(out_dir)


def regrade(out_dir: Path | str, *, pool: RewardPool | None = None) -> Summary:
    """Grade the finished samples of a folder again, from their text, without a model."""
    path = Path(out_dir)
    with open_folder(path, read_config(path)) as folder, _grader(pool) as grader:
        rows = [regraded_row(grader, row)[0] for row in folder.rows]
        write_rows(path / "results.jsonl", rows)
    return summarize(path)


def summarize(out_dir: Path | str) -> Summary:
    """The summary of the samples there are, written to the folder with its reports.

    Raises EvaluationError if the folder has no evaluation in it.
    """
    path = Path(out_dir)
    rows = read_rows(path / "results.jsonl")
    problems = [Problem(**row) for row in read_rows(path / "problems.jsonl")]
    perf = _perf(read_rows(path / "timings.jsonl"), rows)
    summary = summary_of(rows, read_config(path), problems=problems, perf=perf)
    replace(path / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode() + b"\n")
    write_report(path, summary, problems, rows)
    return summary


def requests_of(
    benchmark: Benchmark,
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
    prompt: str = PROMPT,
) -> list[SampleRequest]:
    """Every sample of an evaluation, in the benchmark's order."""
    return [
        SampleRequest(
            id=problem.id,
            sample=sample,
            messages=({"role": "user", "content": prompt.replace("{problem}", problem.problem)},),
            seed=sample_seed(seed, benchmark.name, problem.id, sample),
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            budgets=budgets_of(max_tokens),
        )
        for problem in benchmark.problems
        for sample in range(samples)
    ]


def config_of(
    benchmark: Benchmark,
    sampling: Mapping[str, float],
    prompt: str,
    prompts: Mapping[str, str],
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """What a resume must repeat: config.json of an evaluation's folder.

    sampling: samples, temperature, top_p, max_tokens and seed. prompts: by problem's id, as the
    model reads them: another chat template is another evaluation.
    """
    return {
        "benchmark": {
            "name": benchmark.name,
            "source": benchmark.source,
            "revision": benchmark.revision,
            "sha256": benchmark.sha256,
            "problems": len(benchmark.problems),
        },
        "sampling": dict(sampling),
        "prompt": prompt,
        "prompts_sha256": hashlib.sha256(json.dumps(sorted(prompts.items())).encode()).hexdigest(),
        "model": dict(model),
    }


def _run(
    benchmark: Benchmark,
    generator: Generator,
    grader: RewardPool,
    folder: Folder,
    todo: Sequence[SampleRequest],
    progress: Callable[[int, int, Row], None] | None,
) -> None:
    problems = {problem.id: problem for problem in benchmark.problems}
    wanted = {(request.id, request.sample): request for request in todo}
    total = len(folder.rows) + len(wanted)
    outputs = generator.generate(_longest_first(todo, folder.rows))
    try:
        for output in outputs:
            if output.finish_reason == "abort":
                continue
            request = wanted.pop((output.id, output.sample), None)
            if request is None:
                raise EvaluationError(
                    f"the generator gave sample {output.sample} of {output.id!r}, "
                    "which was not asked for or was there already"
                )
            row, grade_ms = graded_row(grader, problems[output.id], request, output)
            timing = {"id": row["id"], "sample": row["sample"], "at": time.time()}
            folder.add(row, timing | {"seconds": output.seconds, "grade_ms": grade_ms})
            if progress is not None:
                progress(len(folder.rows), total, row)
    finally:
        if isinstance(outputs, GeneratorType):
            outputs.close()


def _longest_first(todo: Sequence[SampleRequest], rows: Sequence[Row]) -> list[SampleRequest]:
    """By the mean length of the problem's answers so far, else by the length of its text."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        lengths[row["id"]].append(row["tokens"])

    def expected(request: SampleRequest) -> tuple[float, int]:
        known = lengths.get(request.id)
        text = sum(len(message["content"]) for message in request.messages)
        return (sum(known) / len(known) if known else float("inf"), text)

    return sorted(todo, key=expected, reverse=True)


def _perf(timings: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """Wall time from each start to its last sample, summed over the runs that it took."""
    wall_s = gpu_s = 0.0
    start: Row | None = None
    last = 0.0
    for line in [*timings, {"event": "start", "at": 0.0, "gpus": 0}]:
        if line.get("event") != "start":
            last = line["at"]
            continue
        if start is not None:
            wall_s += max(0.0, last - start["at"])
            gpu_s += max(0.0, last - start["at"]) * start["gpus"]
        start, last = line, line["at"]
    tokens = sum(row["tokens"] for row in rows)
    return {
        "wall_s": wall_s,
        "tokens_per_s": tokens / wall_s if wall_s else None,
        "gpu_hours": gpu_s / 3600,
        "environment": next((t["environment"] for t in timings[::-1] if "environment" in t), {}),
    }


def _grader(pool: RewardPool | None) -> AbstractContextManager[RewardPool]:
    return RewardPool() if pool is None else nullcontext(pool)


def _check(samples: int, temperature: float, top_p: float, max_tokens: int, prompt: str) -> None:
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    if "{problem}" not in prompt:
        raise ValueError(f"the prompt has no {{problem}} in it: {prompt!r}")


def _check_context(generator: Generator, max_tokens: int) -> None:
    context = generator.max_context
    if context is not None and max_tokens >= context:
        raise EvaluationError(
            f"max_tokens is {max_tokens}, but the model's context is {context} tokens, prompt "
            "included: ask for fewer, or convert the model to a longer context"
        )
