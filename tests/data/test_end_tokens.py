"""What ends an answer: the end token, and what the chat template closes a turn with."""

from __future__ import annotations

import pytest

from sse_rl.data.tokenizer import PAD, TURN_END, byte_tokenizer, end_token_ids
from sse_rl.errors import UserError


def ids(tokenizer, *tokens):
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


def test_an_end_token_that_closes_turns_is_the_only_one():
    tokenizer = byte_tokenizer()
    assert end_token_ids(tokenizer) == ids(tokenizer, TURN_END)


def test_the_token_that_closes_a_turn_ends_an_answer_too():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = PAD
    assert end_token_ids(tokenizer) == ids(tokenizer, PAD, TURN_END)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no such conversation') }}",
        "{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}",
        "{{ messages[0]['content'] }}",
    ],
)
def test_a_template_that_closes_no_turn_adds_nothing(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert end_token_ids(tokenizer) == ids(tokenizer, TURN_END)


def test_without_an_end_token_nothing_could_end():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        end_token_ids(tokenizer)
