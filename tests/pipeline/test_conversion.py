"""Conversion as a command and as the first stages of a recipe, on a teacher of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sse_rl.data.tokenizer import byte_tokenizer, load_tokenizer
from sse_rl.errors import UserError
from sse_rl.model import SSEForCausalLM
from sse_rl.pipeline.conversion import convert_checkpoint
from sse_rl.pipeline.initial import context_length, initialise, run_distill
from sse_rl.recipe import Recipe
from sse_rl.recipe_io import parse_recipe

TOKENIZER = byte_tokenizer()


def recipe(source: str, *overrides: str) -> Recipe:
    text = f"""
name: tiny
model: {{convert: {{source: {source}, attention_layers: [1]}}}}
data:
  tokenizer: {source}
  prompt_template: "{{expression}}"
  max_prompt_length: 64
  train: {{task: chain_sum, task_args: {{min_terms: 2, max_terms: 2}}, size: 60}}
distill:
  align_steps: 1
  max_steps: 1
  per_device_train_batch_size: 1
  max_length: 48
  eval_tokens: 96
  teacher_prompts: 3
  max_completion_length: 6
rollout: {{max_num_seqs: 4}}
cluster: {{learner_threads: 1}}
"""
    return parse_recipe(text, overrides)


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
    assert context_length(of, len(tokenizer)) == 128
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
        context_length(recipe(source), 300)
