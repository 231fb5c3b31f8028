"""What a distillation reads and is measured on, and the teacher's own answers among it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from sse_rl.data.corpus import PackedText, corpus_name, read_corpus, worked
from sse_rl.data.problems import load_splits
from sse_rl.data.prompts import drop_long, render
from sse_rl.data.stream import PromptStream
from sse_rl.data.tokenizer import end_token_ids
from sse_rl.errors import UserError
from sse_rl.model import SSEForCausalLM
from sse_rl.recipe import Recipe
from sse_rl.rollout.engine import Engine
from sse_rl.types import Request, SamplingParams

ANSWERS = "teacher.jsonl"
BLOCK = 256
"""Prompts answered between two writes to disk."""


def training_text(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    teacher: SSEForCausalLM,
    run_dir: Path,
    progress: Callable[[int, dict[str, float]], None],
) -> PackedText:
    """All corpora of `recipe.distill` and, if asked for, the teacher's answers, in packed rows.

    `progress` is called as steps are reported, with the number of answers, while it answers.
    """
    options = recipe.distill
    assert options is not None
    if options.corpora:
        documents = [
            document
            for corpus in options.corpora
            for document in read_corpus(corpus, tokenizer, recipe.data)
        ]
    else:
        documents = worked(load_splits(recipe.data)[0], tokenizer, recipe.data)
    if options.teacher_prompts:
        documents += teacher_answers(recipe, tokenizer, teacher, run_dir / ANSWERS, progress)
    return PackedText(documents, max_length=options.max_length, seed=recipe.seed)


def held_out_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, PackedText]:
    """The texts whose perplexity is measured, by name."""
    options = recipe.distill
    assert options is not None
    texts = {
        corpus_name(corpus): read_corpus(corpus, tokenizer, recipe.data) for corpus in options.eval
    }
    if not texts:
        _, problems = load_splits(recipe.data)
        if not problems:
            raise UserError("distill.eval: no text to measure perplexity on, nor held-out problems")
        texts["held-out"] = worked(problems, tokenizer, recipe.data)
    return {
        name: PackedText(documents, max_length=options.max_length, seed=0)
        for name, documents in texts.items()
    }


def teacher_answers(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    teacher: SSEForCausalLM,
    path: Path,
    progress: Callable[[int, dict[str, float]], None],
) -> list[np.ndarray]:
    """The teacher's samples at temperature 1, each with its prompt, one a line in `path`.

    They are written block by block, and a request's answer depends on itself alone: an interrupted
    call goes on with the same answers.
    """
    options = recipe.distill
    assert options is not None
    problems, _ = load_splits(recipe.data)
    prompts = drop_long(render(problems, tokenizer, recipe.data), recipe.data.max_prompt_length)
    stream = PromptStream(prompts, recipe.seed)
    done = [json.loads(line) for line in _whole_lines(path)]
    rollout = recipe.rollout
    context = recipe.data.max_prompt_length + options.max_completion_length
    engine = Engine(
        teacher.requires_grad_(False),
        max_num_seqs=rollout.max_num_seqs,
        num_pages=rollout.max_num_seqs * -(-context // rollout.page_size) + 1,
        page_size=rollout.page_size,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        eos_token_ids=end_token_ids(tokenizer),
        max_model_len=context,
    )
    while len(done) < options.teacher_prompts:
        size = min(BLOCK, options.teacher_prompts - len(done))
        asked = [stream[len(done) + i] for i in range(size)]
        requests = [
            Request(
                str(i),
                prompt.token_ids,
                SamplingParams(
                    max_tokens=options.max_completion_length, seed=recipe.seed + len(done) + i
                ),
            )
            for i, prompt in enumerate(asked)
        ]
        answers = engine.generate(requests)
        block = [
            [*prompt.token_ids, *answer[0].token_ids.tolist()]
            for prompt, answer in zip(asked, answers, strict=True)
        ]
        with path.open("a") as file:
            file.writelines(json.dumps(ids) + "\n" for ids in block)
        done += block
        progress(0, {"answers": len(done)})
    return [np.array(ids) for ids in islice(done, options.teacher_prompts)]


def _whole_lines(path: Path) -> list[str]:
    """The lines that were written to their end; a cut one is taken off the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return whole.splitlines()
