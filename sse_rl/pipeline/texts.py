"""What distillation and the cold start read, looked at before anything is written or started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from sse_rl.data.corpus import PackedText, examples, read_corpus, worked
from sse_rl.data.problems import Problem
from sse_rl.errors import UserError
from sse_rl.pipeline.initial import DISTILL, SFT
from sse_rl.recipe import Corpus, Recipe

HEAD = 1000
"""Rows of a source that are read; all of them where these are too few to judge by."""


def check_texts(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Problem],
    test: Sequence[Problem],
    run_dir: Path,
) -> None:
    """Raises UserError, naming the key, if a stage that is not finished in `run_dir` could not
    read its text, or would find too little of it."""
    if recipe.distill is not None and not (run_dir / DISTILL).exists():
        _check_distill(recipe, tokenizer, train, test)
    if recipe.sft is not None and not (run_dir / SFT).exists():
        _check_sft(recipe, recipe.sft.max_length, tokenizer, train)


def _check_distill(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Problem],
    test: Sequence[Problem],
) -> None:
    options = recipe.distill
    assert options is not None
    if not options.eval and not test:
        raise UserError("distill.eval: no text to measure perplexity on, nor held-out problems")

    for index, corpus in enumerate(options.eval):
        key = f"distill.eval.{index}"
        _pack(key, _documents(key, corpus, recipe, tokenizer), options.max_length)
    if not options.eval:
        _pack("distill.eval", _worked(test, recipe, tokenizer), options.max_length)
    read = [
        document
        for index, corpus in enumerate(options.corpora)
        for document in _documents(f"distill.corpora.{index}", corpus, recipe, tokenizer)
    ]
    if not options.teacher_prompts:  # the teacher's answers may fill what is missing
        documents = read if options.corpora else _worked(train, recipe, tokenizer)
        _pack("distill.corpora", documents, options.max_length)


def _pack(key: str, documents: Sequence[np.ndarray], max_length: int) -> None:
    try:
        PackedText(documents, max_length=max_length, seed=0)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _documents(
    key: str, corpus: Corpus, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> list[np.ndarray]:
    """Documents of a corpus: those of its first rows if they fill a row of distillation."""
    few = {"limit": min(corpus.limit or HEAD, HEAD)}
    if corpus.kind != "aime":  # which drops generated rows
        few["size"] = min(corpus.size, HEAD)
    try:
        head = corpus.model_copy(update=few)
        documents = read_corpus(head, tokenizer, recipe.data)
        if not _fill_a_row(documents, recipe):
            documents = read_corpus(corpus, tokenizer, recipe.data)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return documents


def _worked(
    problems: Sequence[Problem], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> list[np.ndarray]:
    documents = worked(problems[:HEAD], tokenizer, recipe.data)
    if not _fill_a_row(documents, recipe):
        documents += worked(problems[HEAD:], tokenizer, recipe.data)
    return documents


def _fill_a_row(documents: Sequence[np.ndarray], recipe: Recipe) -> bool:
    assert recipe.distill is not None
    return sum(map(len, documents)) >= recipe.distill.max_length


def _check_sft(
    recipe: Recipe, limit: int, tokenizer: PreTrainedTokenizerBase, train: Sequence[Problem]
) -> None:
    shortest = None
    for first in range(0, len(train), HEAD):
        pairs = examples(train[first : first + HEAD], tokenizer, recipe.data)
        lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
        shortest = min(lengths if shortest is None else [shortest, *lengths])
        if shortest <= limit:
            return
    raise UserError(f"sft.max_length = {limit}: the shortest example has {shortest} tokens")
