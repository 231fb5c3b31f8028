"""The cold start: supervised training on worked answers, by TRL's SFTTrainer, before any reward."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from sse_rl.data.corpus import examples
from sse_rl.data.problems import Problem
from sse_rl.errors import Interrupted, UserError
from sse_rl.model.modeling import SSEForCausalLM
from sse_rl.recipe import Data, Sft

Progress = Callable[[int, dict[str, float]], None]


def train_sft(
    model: SSEForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    data: Data,
    sft: Sft,
    seed: int,
    out: Path,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Train `model` in place and save it with its tokenizer in folder `out`; the last metrics.

    `out` appears whole or not at all: once it is there the stage is finished, and its caller need
    not come here. An interrupted call goes on from its last checkpoint (`sft.save_steps`), kept in
    `<out>.part`, or starts anew; either way the same seed ends in the same weights.

    Args:
        progress: called with (step, metrics) every `sft.logging_steps`.
        stopped: asked after every step whether to end.

    Raises:
        Interrupted: as `stopped` asked; unless `sft.save_steps` is 0, a checkpoint is saved.
        UserError: no example fits into `sft.max_length`.
    """
    encoded = encode(problems, tokenizer, data)
    kept = [example for example in encoded if len(example["input_ids"]) <= sft.max_length]
    if not kept:
        shortest = min((len(example["input_ids"]) for example in encoded), default=0)
        raise UserError(f"sft.max_length = {sft.max_length}: the shortest example has {shortest}")
    part = out.with_name(out.name + ".part")
    trainer = ColdStartTrainer(
        model=model,
        args=arguments(sft, seed, part),
        train_dataset=Dataset.from_list(kept),
        processing_class=tokenizer,
        callbacks=[_Stop(stopped), *([_Report(progress)] if progress else [])],
    )
    unfinished = get_last_checkpoint(str(part)) if sft.save_steps and part.is_dir() else None
    try:
        trainer.train(resume_from_checkpoint=unfinished)
    finally:
        trainer.release()
    if trainer.state.global_step < sft.max_steps:
        raise Interrupted
    finished = out.with_name(out.name + ".finished")
    shutil.rmtree(finished, ignore_errors=True)
    model.save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    os.replace(finished, out)
    shutil.rmtree(part, ignore_errors=True)
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    return _numbers(last) | {"examples": len(kept), "dropped": len(encoded) - len(kept)}


def encode(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, data: Data
) -> list[dict[str, list[int]]]:
    """Each problem as {input_ids, labels}: its rendered prompt, masked, then the answer and the
    end token. The prompt's ids are those that a rollout begins with."""
    return [
        {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}
        for prompt, answer in examples(problems, tokenizer, data)
    ]


class ColdStartTrainer(SFTTrainer):
    """Adds the load-balance loss of each micro-batch.

    TRL runs the backbone and its own fused head and never asks the model for a loss, so the
    backbone's `aux_loss` is picked up as it passes.
    """

    def __init__(self, model: SSEForCausalLM, **arguments: Any) -> None:
        super().__init__(model=model, **arguments)
        self._policy = model
        self.remove_callback(PrinterCallback)
        self._aux: torch.Tensor | None = None
        self._hook = model.model.register_forward_hook(self._keep_aux)

    def release(self) -> None:
        """Leave the model as it was before TRL patched it."""
        self._hook.remove()
        del self._policy.forward  # the fused head, an attribute of this instance
        self._policy.gradient_checkpointing_disable()
        self._policy.eval()

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        assert not return_outputs, "no evaluation runs in the cold start"
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        aux, self._aux = self._aux, None
        assert aux is not None
        self._metrics["train"]["aux_loss"].append(aux.item())
        # With num_items_in_batch, Trainer leaves the mean over accumulation steps to the loss.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + self._policy.config.aux_loss_coef * aux / steps

    def _keep_aux(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._aux = output.aux_loss


class _Stop(TrainerCallback):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._stopped():
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"


class _Report(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._progress(state.global_step, _numbers(logs))


def arguments(sft: Sft, seed: int, folder: Path) -> SFTConfig:
    """The section as TRL takes it: packed rows, one forward a micro-batch, no logging but ours."""
    return SFTConfig(
        output_dir=str(folder),
        max_steps=sft.max_steps,
        learning_rate=sft.learning_rate,
        lr_scheduler_type=sft.lr_scheduler_type,
        warmup_steps=sft.warmup_steps,
        weight_decay=sft.weight_decay,
        max_grad_norm=sft.max_grad_norm,
        per_device_train_batch_size=sft.per_device_train_batch_size,
        gradient_accumulation_steps=sft.gradient_accumulation_steps,
        max_length=sft.max_length,
        gradient_checkpointing=sft.gradient_checkpointing,
        bf16=sft.bf16,
        logging_steps=min(sft.logging_steps, sft.max_steps),
        save_strategy="steps" if sft.save_steps else "no",
        save_steps=sft.save_steps or 1,
        save_total_limit=1,
        seed=seed,
        packing=True,
        packing_strategy="bfd",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
    )


def _numbers(logs: dict[str, Any]) -> dict[str, float]:
    names = ("loss", "aux_loss", "learning_rate", "grad_norm", "entropy", "mean_token_accuracy")
    return {name: float(logs[name]) for name in names if name in logs}
