"""Conversion as a command and as the first stages of a recipe, on a teacher of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from sse_rl.data.tokenizer import byte_tokenizer, load_tokenizer
from sse_rl.errors import UserError
from sse_rl.model import SSEForCausalLM
from sse_rl.pipeline.conversion import convert_checkpoint
from sse_rl.pipeline.initial import context_length, initialise, run_distill
from sse_rl.recipe import Recipe
from sse_rl.recipe_io import load_recipe, parse_recipe

TOKENIZER = byte_tokenizer()

CONVERSION = Path(__file__).parent / "conversion.yaml"
OWN = [
    "distill.per_device_train_batch_size=1",
    "distill.teacher_prompts=3",
    "distill.max_completion_length=6",
    "rollout.max_num_seqs=4",
]


def recipe(source: str, *overrides: str) -> Recipe:
    named = [f"model.convert.source={source}", f"data.tokenizer={source}"]
    return load_recipe(CONVERSION, [*named, *OWN, *overrides])


def larger() -> PreTrainedTokenizerBase:
    """The byte tokenizer with words of its own: 300 ids."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<word-{i}>" for i in range(300 - len(tokenizer))])
    return tokenizer


def test_the_command_writes_a_model_with_its_tokenizer(source: str, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    report = convert_checkpoint(source, tmp_path / "out", attention_layers="1,", text=text)
    assert report["attention layers"] == "1" and report["SSE layers"] == "1"
    assert float(report["teacher perplexity"]) < 300
    model = SSEForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.attention_layers == [1]
    again = convert_checkpoint(source, tmp_path / "all", attention_layers="all", text=text)
    assert again["teacher perplexity"] == again["converted perplexity"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_layers": "some"}, "--attention-layers some: expected a count, a list"),
        ({"attention_layers": "7"}, "attention_layers = 7: the model has 2 layers"),
        ({"overrides": ["linear_atn_type=gdn"]}, "did you mean model.convert.linear_attn_type"),
        ({"text": Path("none.txt")}, "--text none.txt: cannot be read"),
    ],
)
def test_a_bad_option_writes_nothing(source: str, tmp_path: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        convert_checkpoint(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_recipe_converts_and_distils(source: str, tmp_path: Path):
    of = recipe(source)
    tokenizer = load_tokenizer(of.data)
    assert context_length(of, tokenizer) == 128
    initialise(of, tokenizer, tmp_path)
    run_distill(of, str(tmp_path), "init")
    measured = json.loads((tmp_path / "distill" / "perplexity.json").read_text())
    assert list(measured) == ["teacher", "converted", "aligned", "distilled"]
    assert all(list(texts) == ["held-out"] for texts in measured.values())
    answers = [json.loads(line) for line in (tmp_path / "teacher.jsonl").open()]
    assert len(answers) == 3
    assert TOKENIZER.decode(answers[0]).startswith("<|im_start|>user\n")
    log = [json.loads(line) for line in (tmp_path / "distill.jsonl").open()]
    assert [row["step"] for row in log] == [0, 1, 2] and log[0]["answers"] == 3
    before, after = (SSEForCausalLM.from_pretrained(tmp_path / n) for n in ("init", "distill"))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_a_recipe_whose_parts_do_not_fit_is_refused(source: str):
    with pytest.raises(UserError, match="the model reads its teacher's tokens"):
        recipe(source, "data.tokenizer=bytes")
    with pytest.raises(UserError, match="distill needs a teacher"):
        recipe(source, "model={path: somewhere}")
    with pytest.raises(UserError, match=r"exactly one of model\.path, model\.config"):
        recipe(source, "model.path=somewhere")
    with pytest.raises(UserError, match="has 300 ids, more than the 262 of"):
        context_length(recipe(source), larger())


def test_a_checkpoint_is_trained_with_its_own_tokenizer(source: str, tmp_path: Path):
    tokenizer, folder, words = larger(), tmp_path / "model", tmp_path / "words"
    convert_checkpoint(source, folder, attention_layers="1,")
    tokenizer.save_pretrained(words)
    assert (folder / "tokenizer.json").exists()

    def context(named: str) -> int:
        data = f"data: {{tokenizer: {named}, train: {{task: chain_sum}}}}"
        of = parse_recipe(f"name: tiny\nmodel: {{path: {folder}}}\n{data}")
        return context_length(of, load_tokenizer(of.data))

    assert context("bytes") == context(str(folder)) == 128
    with pytest.raises(UserError, match=rf"= {words} has 300 ids, .* 262 of model.path = {folder}"):
        context(str(words))
    other = byte_tokenizer()
    other.save_pretrained(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|end|>"))
    told = rf"data\.tokenizer = bytes has .*set data\.tokenizer: {folder}"
    with pytest.raises(UserError, match=told):
        context("bytes")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert context("bytes") == 128
