"""Problems rendered and tokenized: what the engine continues and the cold start imitates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from sse_rl.data.problems import Problem
from sse_rl.errors import UserError
from sse_rl.recipe import Data
from sse_rl.types import Prompt

AT_ONCE = 1024
"""Texts that are tokenized in one call."""


def render(
    problems: Iterable[Problem], tokenizer: PreTrainedTokenizerBase, data: Data
) -> list[Prompt]:
    """Each problem through `data.prompt_template` and the chat template, up to the model's turn.

    Raises:
        UserError: the prompt template names a column that a row does not have.
    """
    asked = [(problem, _rendered(problem, tokenizer, data)) for problem in problems]
    every = tokenize_all([text for _, text in asked], tokenizer)
    return [
        Prompt(
            id=problem.id,
            token_ids=tuple(ids),
            answer=problem.answer,
            kind=problem.kind,
            text=text,
            columns=problem.columns,
        )
        for (problem, text), ids in zip(asked, every, strict=True)
    ]


def drop_long(prompts: Sequence[Prompt], max_prompt_length: int) -> list[Prompt]:
    """The prompts of at most `max_prompt_length` tokens; the caller reports how many fell out.

    Raises:
        UserError: none is that short.
    """
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_length]
    if prompts and not kept:
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        raise UserError(
            f"data.max_prompt_length = {max_prompt_length}: the shortest of {len(prompts)} prompts "
            f"has {shortest} tokens"
        )
    return kept


def refuse_long(prompts: Iterable[Prompt], max_prompt_length: int) -> None:
    """Raise UserError if a prompt is too long: a test set must not shrink in silence."""
    for prompt in prompts:
        if len(prompt.token_ids) > max_prompt_length:
            raise UserError(
                f"problem {prompt.id}: its prompt has {len(prompt.token_ids)} tokens, "
                f"data.max_prompt_length is {max_prompt_length}"
            )


def target(problem: Problem) -> str:
    """What the cold start teaches as the answer: the worked solution, else the boxed answer."""
    box = f"\\boxed{{{problem.answer}}}"
    if problem.solution is None:
        return box
    return problem.solution if "\\boxed" in problem.solution else f"{problem.solution}\n{box}"


def question(problem: Problem, data: Data) -> str:
    """The user's turn. Raises UserError if the template names a column that the row lacks."""
    try:
        return data.prompt_template.format(**problem.columns)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"data.prompt_template = {data.prompt_template!r}: problem {problem.id} has no column "
            f"{error}; it has {', '.join(sorted(problem.columns))}"
        ) from None


def chat(
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None = None,
) -> str:
    """Messages through the chat template, up to the model's turn."""
    turns = [dict(message) for message in messages]
    if system_prompt is not None:
        turns.insert(0, {"role": "system", "content": system_prompt})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of a rendered prompt, whose special tokens the chat template has written already."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenize_all(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Ids of each text without special tokens of the tokenizer's own, so many texts at once, on
    all cores."""
    for first in range(0, len(texts), AT_ONCE):
        some = list(texts[first : first + AT_ONCE])
        batch = tokenizer(some, add_special_tokens=False, return_attention_mask=False)
        yield from batch["input_ids"]  # pyright: ignore[reportReturnType]


def _rendered(problem: Problem, tokenizer: PreTrainedTokenizerBase, data: Data) -> str:
    messages = [{"role": "user", "content": question(problem, data)}]
    return chat(messages, tokenizer, data.system_prompt)
