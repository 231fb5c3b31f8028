"""Distillation on a tiny teacher: what it teaches, and what a stop may not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sse_rl.data.corpus import PackedText
from sse_rl.errors import Interrupted, UserError
from sse_rl.model import SSEForCausalLM
from sse_rl.model.convert import as_softmax, convert
from sse_rl.pipeline.distill import distill
from sse_rl.recipe import Convert, Distill

OPTIONS = Distill(
    align_steps=8,
    align_learning_rate=1e-2,
    max_steps=8,
    learning_rate=5e-3,
    warmup_steps=1,
    per_device_train_batch_size=2,
    max_length=32,
    logging_steps=1,
    save_steps=3,
)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def text(seed: int = 0) -> PackedText:
    """Sequences in which each token is likely the one before it plus one."""
    rng = np.random.default_rng(seed)
    documents = []
    for length in rng.integers(3, 50, 30):
        jumps = np.where(rng.random(length) < 0.8, 1, rng.integers(0, 40, length))
        documents.append(jumps.cumsum() % 40)
    return PackedText(documents, max_length=32, seed=0)


def student(llama: LlamaForCausalLM, linear: str = "gla") -> SSEForCausalLM:
    options = {"source": "test", "attention_layers": [1], "linear_attn_type": linear}
    return convert(llama, Convert.model_validate(options))


def run(
    llama: LlamaForCausalLM, state: Path, options: Distill = OPTIONS, **more: object
) -> tuple[SSEForCausalLM, dict[str, dict[str, float]]]:
    subject = more.pop("subject", None) or student(llama)
    teacher = as_softmax(llama, "test")
    held_out = {"held-out": text(1)}
    measured = distill(
        subject, teacher, text(), held_out, options=options, seed=0, state=state, **more
    )
    return subject, measured


@pytest.mark.parametrize("linear", ["gla", "gdn"])
def test_both_stages_bring_the_student_nearer_to_its_teacher(llama, tmp_path: Path, linear: str):
    losses: list[dict[str, float]] = []
    _, measured = run(
        llama,
        tmp_path / "state",
        subject=student(llama, linear),
        progress=lambda step, metrics: losses.append(metrics),
    )
    assert list(measured) == ["teacher", "converted", "aligned", "distilled"]
    assert losses[7]["loss"] < 0.98 * losses[0]["loss"]
    assert losses[-1]["kl"] < 0.98 * losses[8]["kl"]
    assert measured["distilled"]["held-out"] < measured["converted"]["held-out"]


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory) -> tuple[SSEForCausalLM, dict[str, dict[str, float]]]:
    return run(llama, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [4, 8, 13])
def test_a_stop_does_not_change_the_weights(llama, whole, tmp_path: Path, stop: int):

    def interrupt(step: int, _: object) -> None:
        if step == stop:
            raise Stop

    with pytest.raises(Stop):
        run(llama, tmp_path / "state", progress=interrupt)
    resumed, again = run(llama, tmp_path / "state")
    assert again == whole[1]
    for name, x in whole[0].state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name


def test_nothing_is_learned_twice_after_a_stop_that_was_asked_for(llama, whole, tmp_path: Path):
    reported: list[int] = []

    def part(stop: int | None) -> tuple[SSEForCausalLM, dict[str, dict[str, float]]]:
        return run(
            llama,
            tmp_path / "state",
            progress=lambda step, _: reported.append(step),
            stopped=lambda: reported[-1:] == [stop],
        )

    for stop in (4, 8, 13):
        with pytest.raises(Interrupted):
            part(stop)
    resumed, again = part(None)
    assert reported == list(range(1, 17)) and again == whole[1]
    for name, x in whole[0].state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name


@pytest.mark.parametrize("stop", [2, 4, 6, 9])
def test_a_teacher_that_learned_the_text_first_teaches_it(llama, tmp_path: Path, stop: int):
    changes = {"teacher_steps": 5, "teacher_learning_rate": 1e-2, "save_steps": 2}
    options = OPTIONS.model_copy(update={"align_steps": 3, "max_steps": 3} | changes)
    whole, measured = run(llama, tmp_path / "whole", options)
    order = ["teacher", "converted", "teacher, trained", "aligned", "distilled"]
    assert list(measured) == order
    assert measured["teacher, trained"]["held-out"] < 0.95 * measured["teacher"]["held-out"]

    def interrupt(step: int, _: object) -> None:
        if step == stop:
            raise Stop

    with pytest.raises(Stop):
        run(llama, tmp_path / "state", options, progress=interrupt)
    resumed, again = run(llama, tmp_path / "state", options)
    assert again == measured
    for name, x in whole.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name


def test_a_teacher_can_be_trained_on_the_same_text(llama, tmp_path: Path):
    options = OPTIONS.model_copy(update={"align_steps": 0, "kl_coef": 0.0, "lm_coef": 1.0})
    _, measured = run(llama, tmp_path / "s", options, subject=as_softmax(llama, "test"))
    assert measured["converted"] == measured["teacher"]
    assert measured["distilled"]["held-out"] < 0.9 * measured["teacher"]["held-out"]


def test_it_trains_under_bfloat16(llama, tmp_path: Path):
    short = {"align_steps": 2, "max_steps": 2, "bf16": True, "gradient_checkpointing": True}
    subject, measured = run(llama, tmp_path / "s", OPTIONS.model_copy(update=short))
    assert subject.lm_head.weight.dtype == torch.float32
    assert measured["distilled"]["held-out"] == pytest.approx(
        measured["converted"]["held-out"], rel=0.5
    )


def test_a_damaged_state_is_refused(llama, tmp_path: Path):
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"state\.pt: damaged"):
        run(llama, tmp_path)


def test_aligning_a_model_without_converted_layers_is_refused(llama, tmp_path):
    kept = convert(llama, Convert(source="test", attention_layers=3))
    with pytest.raises(UserError, match=r"distill\.align_steps = 8: every layer stays attention"):
        distill(
            kept,
            as_softmax(llama, "test"),
            text(),
            {},
            options=OPTIONS,
            seed=0,
            state=tmp_path / "state",
        )
    assert not (tmp_path / "state").exists()
