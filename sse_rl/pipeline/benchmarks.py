"""What a run is evaluated on: the recipe's held-out problems, and the benchmarks that it names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from sse_eval import Benchmark, Problem, load_benchmark

from sse_rl.data.problems import Problem as DataProblem
from sse_rl.data.prompts import chat, question, tokenize
from sse_rl.errors import UserError
from sse_rl.pipeline.evaluate import as_user_error
from sse_rl.recipe import Data, Recipe

HELD_OUT = "heldout"


class RunBenchmark(NamedTuple):
    benchmark: Benchmark
    prompt: str
    """With `{problem}` as its only placeholder."""
    longest: int
    """Tokens of the longest prompt and its answer."""


def run_benchmarks(
    recipe: Recipe, test: Sequence[DataProblem], tokenizer: Any
) -> list[RunBenchmark]:
    """All benchmarks of a run, read and checked. Raises UserError for one that cannot be had."""
    found = [RunBenchmark(held_out(test, recipe.data), "{problem}", 0)] if test else []
    template = braces(recipe)
    if recipe.eval.benchmarks and "{problem}" not in template:
        raise UserError(
            f"data.prompt_template = {recipe.data.prompt_template!r}: eval.benchmarks need "
            "{problem} in it"
        )
    for place, name in enumerate(recipe.eval.benchmarks):
        try:
            benchmark = as_user_error(load_benchmark, name)
        except UserError as error:
            raise UserError(f"eval.benchmarks.{place}: {error}") from None
        if benchmark.name in {other.benchmark.name for other in found}:
            raise UserError(
                f"eval.benchmarks.{place} = {name}: there are two benchmarks of the name "
                f"{benchmark.name!r}"
            )
        found.append(RunBenchmark(benchmark, template, 0))
    return [entry._replace(longest=_longest(entry, recipe, tokenizer)) for entry in found]


def held_out(problems: Sequence[DataProblem], data: Data) -> Benchmark:
    """The recipe's held-out problems as a benchmark whose prompt is `{problem}`: the template is
    applied already."""
    rows = tuple(
        Problem(id=p.id, problem=question(p, data), answer=p.answer, kind=p.kind) for p in problems
    )
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    return Benchmark(name=HELD_OUT, problems=rows, source="data", revision="", sha256=digest)


def answer_tokens(recipe: Recipe) -> int:
    """Tokens that an evaluated answer may take."""
    if recipe.eval.max_tokens is not None:
        return recipe.eval.max_tokens
    return recipe.grpo.max_completion_length if recipe.grpo else 512


def braces(recipe: Recipe) -> str:
    """The template as sse_eval writes it: `{problem}` is a placeholder, other braces are text."""
    return recipe.data.prompt_template.replace("{{", "{").replace("}}", "}")


def _longest(entry: RunBenchmark, recipe: Recipe, tokenizer: Any) -> int:
    texts = (entry.prompt.replace("{problem}", p.problem) for p in entry.benchmark.problems)
    prompts = (
        chat([{"role": "user", "content": text}], tokenizer, recipe.data.system_prompt)
        for text in texts
    )
    return max(len(tokenize(prompt, tokenizer)) for prompt in prompts) + answer_tokens(recipe)
