"""The cold start: what its loss holds, what packing may not change, what a kill may not change."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import datasets
import pytest
import torch
from datasets import Dataset

from sse_rl.data.problems import Problem
from sse_rl.data.tokenizer import byte_tokenizer
from sse_rl.errors import Interrupted, UserError
from sse_rl.model import SSEConfig, SSEForCausalLM
from sse_rl.pipeline.sft import ColdStartTrainer, arguments, encode, train_sft
from sse_rl.recipe import Data, Sft, Source

datasets.disable_progress_bars()
TOKENIZER = byte_tokenizer()
DATA = Data(train=Source(task="chain_sum"), prompt_template="{problem}")
SFT = Sft(
    max_steps=4,
    learning_rate=1e-2,
    per_device_train_batch_size=2,
    max_length=64,
    gradient_checkpointing=False,
    logging_steps=1,
)
PROBLEMS = [
    Problem(str(n), f"{n} + {n}", str(2 * n), columns={"problem": f"{n} + {n}"}) for n in range(24)
]


def model(kind: Literal["gla", "gdn"] = "gla", aux_loss_coef: float = 0.01) -> SSEForCausalLM:
    torch.manual_seed(0)
    return SSEForCausalLM(
        SSEConfig(
            hidden_size=16,
            head_dim=8,
            num_heads=2,
            num_writer=1,
            num_reader=1,
            num_hidden_layers=2,
            linear_attn_type=kind,
            attn={"layers": [1], "num_heads": 2},
            use_short_conv=True,
            intermediate_size=32,
            vocab_size=len(TOKENIZER),
            aux_loss_coef=aux_loss_coef,
        )
    )


def trainer(of: SSEForCausalLM, folder: Path, sft: Sft = SFT) -> ColdStartTrainer:
    return ColdStartTrainer(
        model=of,
        args=arguments(sft, 0, folder),
        train_dataset=Dataset.from_list(encode(PROBLEMS, TOKENIZER, DATA)),
        processing_class=TOKENIZER,
    )


def first_loss(of: SSEForCausalLM, folder: Path) -> torch.Tensor:
    """The loss of the first micro-batch."""
    training = trainer(of.train(), folder)
    return training.compute_loss(of, next(iter(training.get_train_dataloader())))


def train(out: Path, seed: int = 0, **options: object) -> dict[str, torch.Tensor]:
    trained = model()
    train_sft(trained, TOKENIZER, PROBLEMS, data=DATA, sft=SFT, seed=seed, out=out, **options)
    return trained.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_prompt_is_what_a_rollout_begins_with_and_is_not_learned():
    (example,) = encode(PROBLEMS[3:4], TOKENIZER, DATA)
    ids, labels = example["input_ids"], example["labels"]
    assert TOKENIZER.decode(ids) == (
        "<|im_start|>user\n3 + 3<|im_end|>\n<|im_start|>assistant\n\\boxed{6}<|im_end|>"
    )
    learned = [label for label in labels if label != -100]
    assert TOKENIZER.decode(learned) == "\\boxed{6}<|im_end|>"
    assert ids[-len(learned) :] == learned


def test_the_router_of_gdn_learns_from_the_auxiliary_loss(tmp_path: Path):
    grads = {}
    for coef in (0.0, 0.01):
        subject = model("gdn", coef)
        first_loss(subject, tmp_path).backward()
        grad = subject.model.layers[0].attn.e_proj.weight.grad
        assert grad is not None
        grads[coef] = grad.norm().item()
    assert grads[0.01] > 1e-4
    assert grads[0.01] > 100 * grads[0.0]  # what is left without it is the norm's epsilon


def test_the_loss_is_that_of_the_model_itself(tmp_path: Path):
    subject = model(aux_loss_coef=0.1).train()
    training = trainer(subject, tmp_path)
    batch = next(iter(training.get_train_dataloader()))
    ours = training.compute_loss(subject, dict(batch))
    training.release()
    theirs = subject.train()(**batch).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_packing_leaks_nothing_between_examples(tmp_path: Path):
    subject = model(aux_loss_coef=0.0).train()
    training = trainer(subject, tmp_path)
    batch = next(iter(training.get_train_dataloader()))
    bounds = batch["cu_seq_lens_q"].tolist()
    assert len(bounds) > 3
    packed = training.compute_loss(subject, dict(batch))
    training.release()
    total, count = 0.0, 0
    for start, end in itertools.pairwise(bounds):
        ids, labels = batch["input_ids"][:, start:end], batch["labels"][:, start:end]
        learned = int((labels[:, 1:] != -100).sum())
        total += subject(input_ids=ids, labels=labels).loss.item() * learned
        count += learned
    assert packed.item() == pytest.approx(total / count, rel=1e-5)


def test_accumulation_does_not_change_the_weight_of_the_auxiliary_loss(tmp_path: Path):
    moved = []
    for rows, accumulation in ((2, 1), (1, 2)):
        subject = model(aux_loss_coef=1.0)
        sft = SFT.model_copy(
            update={
                "max_steps": 1,
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": accumulation,
            }
        )
        train_sft(
            subject, TOKENIZER, PROBLEMS, data=DATA, sft=sft, seed=0, out=tmp_path / str(rows)
        )
        moved.append(subject.lm_head.weight.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=2e-4)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path):
    once = train(tmp_path / "a")
    assert same(once, train(tmp_path / "b"))
    assert not same(once, train(tmp_path / "c", seed=1))
    saved = SSEForCausalLM.from_pretrained(tmp_path / "a").state_dict()
    assert same(once, saved)


def test_an_interrupted_cold_start_ends_in_the_same_weights(tmp_path: Path):
    sft = SFT.model_copy(update={"save_steps": 2})
    calls: list[int] = []

    def kill(step: int, metrics: dict[str, float]) -> None:
        calls.append(step)
        if step == 3:
            raise KeyboardInterrupt

    whole = train(tmp_path / "whole")
    out = tmp_path / "sft"
    with pytest.raises(KeyboardInterrupt):
        train_sft(model(), TOKENIZER, PROBLEMS, data=DATA, sft=sft, seed=0, out=out, progress=kill)
    assert not out.exists()
    subject = model()
    resumed: list[int] = []
    metrics = train_sft(
        subject,
        TOKENIZER,
        PROBLEMS,
        data=DATA,
        sft=sft,
        seed=0,
        out=out,
        progress=lambda step, _: resumed.append(step),
    )
    assert resumed == [3, 4]
    assert same(whole, subject.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sft", "whole"]
    assert metrics["loss"] > 0 and metrics["aux_loss"] > 0.9


def test_a_cold_start_that_is_asked_to_stop_keeps_what_it_learned(tmp_path: Path):
    sft = SFT.model_copy(update={"save_steps": 100})
    rest = {"data": DATA, "sft": sft, "seed": 0, "out": tmp_path / "sft"}
    steps: list[int] = []

    def report(step: int, _: dict[str, float]) -> None:
        steps.append(step)

    def ask(stop: int) -> Callable[[], bool]:
        return lambda: steps[-1:] == [stop]

    with pytest.raises(Interrupted):
        train_sft(model(), TOKENIZER, PROBLEMS, progress=report, stopped=ask(2), **rest)
    subject = model()
    train_sft(subject, TOKENIZER, PROBLEMS, progress=report, stopped=ask(0), **rest)
    assert steps == [1, 2, 3, 4]
    assert same(train(tmp_path / "whole"), subject.state_dict())


def test_examples_longer_than_a_row_are_counted_and_none_left_is_refused(tmp_path: Path):
    long = Problem("long", "?", "1", solution="x" * 100, columns={"problem": "?"})
    metrics = train_sft(
        model(), TOKENIZER, [*PROBLEMS, long], data=DATA, sft=SFT, seed=0, out=tmp_path / "sft"
    )
    assert (metrics["examples"], metrics["dropped"]) == (24, 1)
    with pytest.raises(UserError, match=r"sft.max_length = 64: the shortest example has 1\d\d"):
        train_sft(model(), TOKENIZER, [long], data=DATA, sft=SFT, seed=0, out=tmp_path / "none")
