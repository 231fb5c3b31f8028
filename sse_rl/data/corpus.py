"""Text of any kind as packed rows of tokens: what distillation reads, and what perplexity is of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sse_rl.data.problems import Problem, load_problems, load_texts
from sse_rl.data.prompts import render, target, tokenize_all
from sse_rl.errors import UserError
from sse_rl.recipe import Corpus, Data


class Rows(NamedTuple):
    """Sequences end to end."""

    tokens: np.ndarray
    """[T] int64."""
    lengths: list[int]
    """Of the sequences; they sum to T."""


class PackedText:
    """Documents cut into rows of exactly `max_length` tokens, in an order drawn from the seed.

    A document that a row's end cuts goes on in the next row as a sequence of its own; what is left
    after the last whole row falls out. Example: documents of 5 and 4 tokens in rows of 3 are
    [3], [2, 1], [3].

    Raises:
        UserError: the documents do not fill one row.
    """

    def __init__(self, documents: Sequence[np.ndarray], *, max_length: int, seed: int) -> None:
        self.max_length = max_length
        self._seed = seed
        order = np.random.default_rng([seed, 0]).permutation(len(documents))
        self._tokens = np.concatenate([documents[i] for i in order])
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._ends = np.cumsum([len(documents[i]) for i in order])
        if len(self) == 0:
            raise UserError(
                f"distill.max_length = {max_length}: all text together has {len(self._tokens)} "
                "tokens, less than one row"
            )

    def __len__(self) -> int:
        """Rows."""
        return len(self._tokens) // self.max_length

    def batch(self, number: int, size: int) -> Rows:
        """Rows number*size to (number+1)*size of endless epochs, each in a fresh order."""
        return _joined([self._row(self._dealt(number * size + i)) for i in range(size)])

    def in_order(self, tokens: int, size: int = 1) -> list[Rows]:
        """The first rows, `size` at a time: as many as `tokens` pays for, at least one."""
        rows = [self._row(i) for i in range(min(len(self), max(1, tokens // self.max_length)))]
        return [_joined(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _dealt(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, 1 + epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self))
        return int(self._order[place])

    def _row(self, index: int) -> Rows:
        begin, end = index * self.max_length, (index + 1) * self.max_length
        first, last = np.searchsorted(self._ends, [begin, end], side="right")
        inside = [int(cut) for cut in self._ends[first:last] if begin < cut < end]
        lengths = [b - a for a, b in pairwise([begin, *inside, end])]
        return Rows(self._tokens[begin:end], lengths)


def _joined(rows: Sequence[Rows]) -> Rows:
    lengths = [length for row in rows for length in row.lengths]
    return Rows(np.concatenate([row.tokens for row in rows]), lengths)


def read_corpus(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: Data) -> list[np.ndarray]:
    """The documents of a corpus as token ids, each closed by the end token; chat messages by what
    their template closes them with.

    Raises:
        UserError: it cannot be read, or a row has no text; see `load_problems` and `load_texts`.
    """
    if corpus.text is None:
        return worked(load_problems(corpus), tokenizer, data)
    loaded = load_texts(corpus, corpus.text)
    texts: list[Any] = [
        text if isinstance(text, str) else tokenizer.apply_chat_template(text, tokenize=False)
        for text in loaded
    ]
    return [
        np.array([*ids, tokenizer.eos_token_id] if isinstance(text, str) else ids, dtype=np.int64)
        for text, ids in zip(loaded, tokenize_all(texts, tokenizer), strict=True)
    ]


def worked(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, data: Data
) -> list[np.ndarray]:
    """Each problem's prompt, its solution and the end token, as the cold start teaches them."""
    return [np.array([*prompt, *answer]) for prompt, answer in examples(problems, tokenizer, data)]


def examples(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, data: Data
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Ids of each problem's prompt, as a rollout begins with them, and of its solution with the
    end token."""
    prompts = render(problems, tokenizer, data)
    answers = tokenize_all([target(problem) for problem in problems], tokenizer)
    return [
        (prompt.token_ids, [*answer, tokenizer.eos_token_id])  # pyright: ignore[reportReturnType]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def corpus_name(corpus: Corpus) -> str:
    """What its perplexity is reported under, e.g. `gsm8k_test` or `math500.problem`."""
    name = corpus.dataset or corpus.task or Path(corpus.path or "").stem
    return name if corpus.text is None else f"{name}.{corpus.text}"
