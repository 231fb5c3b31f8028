"""Tokens: the byte-level tokenizer, rendering, and the order in which prompts are dealt."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sse_rl.data.problems import Problem
from sse_rl.data.prompts import (
    AT_ONCE,
    drop_long,
    refuse_long,
    render,
    target,
    tokenize,
    tokenize_all,
)
from sse_rl.data.stream import PromptStream
from sse_rl.data.tokenizer import byte_tokenizer, load_tokenizer
from sse_rl.errors import UserError
from sse_rl.recipe import Data, Source

TOKENIZER = byte_tokenizer()
DATA = Data(train=Source(task="chain_sum"), prompt_template="{expression} =")
PROBLEM = Problem("p", "What is 1 + 2?", "3", columns={"expression": "1 + 2"})


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_text_is_its_bytes(text: str):
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_a_saved_tokenizer_is_read_by_plain_transformers(tmp_path: Path):
    TOKENIZER.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 262
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    messages = [{"role": "user", "content": "né"}, {"role": "assistant", "content": "3"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nné<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )


def test_texts_tokenized_together_have_the_ids_that_each_has_alone():
    texts = ["", "né", "<|im_start|>user\n1 + 2<|im_end|>\n"] * (AT_ONCE // 2)
    alone = [[*tokenize(text, TOKENIZER)] for text in texts]
    assert list(tokenize_all(texts, TOKENIZER)) == alone
    assert list(tokenize_all([], TOKENIZER)) == []


def test_a_prompt_ends_where_the_model_begins():
    (prompt,) = render([PROBLEM], TOKENIZER, DATA)
    assert prompt.text == "<|im_start|>user\n1 + 2 =<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(prompt.token_ids) == prompt.text
    assert len(prompt.token_ids) == len("1 + 2 =") + 4
    assert (prompt.id, prompt.answer) == ("p", "3")


def test_a_system_prompt_goes_first():
    (prompt,) = render([PROBLEM], TOKENIZER, DATA.model_copy(update={"system_prompt": "Add."}))
    assert prompt.text.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n")


def test_a_template_with_an_unknown_column_is_refused():
    with pytest.raises(UserError, match="no column 'answers'; it has expression"):
        render([PROBLEM], TOKENIZER, DATA.model_copy(update={"prompt_template": "{answers}"}))


def test_the_cold_start_imitates_the_solution_or_the_box():
    assert target(PROBLEM) == "\\boxed{3}"
    assert target(Problem("p", "?", "3", solution="It is 3.")) == "It is 3.\n\\boxed{3}"
    assert target(Problem("p", "?", "3", solution="So \\boxed{3}.")) == "So \\boxed{3}."


def test_long_prompts_are_left_out_of_training_and_refused_in_tests():
    longer = Problem("q", "?", "3", columns={"expression": "1 + 2 + 3 + 4"})
    prompts = render([PROBLEM, longer], TOKENIZER, DATA)
    limit = len(prompts[0].token_ids)
    assert drop_long(prompts, limit) == prompts[:1]
    with pytest.raises(UserError, match="problem q: its prompt has"):
        refuse_long(prompts, limit)
    with pytest.raises(UserError, match="the shortest of 2 prompts"):
        drop_long(prompts, limit - 1)


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(DATA.model_copy(update={"tokenizer": str(tmp_path)}))
    bare = byte_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(DATA.model_copy(update={"tokenizer": str(tmp_path)}))


def test_a_chat_template_file_replaces_the_tokenizers_own(tmp_path: Path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    data = DATA.model_copy(update={"chat_template": str(path)})
    assert render([PROBLEM], load_tokenizer(data), data)[0].text == "[1 + 2 =]"


def stream(seed: int = 0, count: int = 5) -> PromptStream:
    problems = [Problem(str(i), "?", "0", columns={"expression": str(i)}) for i in range(count)]
    return PromptStream(render(problems, TOKENIZER, DATA), seed)


def test_each_epoch_deals_every_prompt_once_in_another_order():
    dealt = stream().next(15)
    epochs = [[prompt.id for _, prompt in dealt[i : i + 5]] for i in (0, 5, 10)]
    assert [position for position, _ in dealt] == list(range(15))
    assert all(sorted(epoch) == list("01234") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_depends_on_the_seed_alone():
    assert stream(1).next(15) == stream(1).next(15)
    assert stream(1).next(15) != stream(2).next(15)


def test_a_restored_stream_goes_on_where_it_was():
    first, second = stream(), stream()
    first.next(7)
    second.load_state_dict(first.state_dict())
    assert second.next(9) == first.next(9)


def test_a_stream_of_another_run_is_refused():
    with pytest.raises(UserError, match="seed = 0, this run has 1"):
        stream(seed=1).load_state_dict(stream().state_dict())
    with pytest.raises(UserError, match="prompts = 5, this run has 6"):
        stream(count=6).load_state_dict(stream().state_dict())
