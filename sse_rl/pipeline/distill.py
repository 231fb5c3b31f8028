"""Distillation of a converted model: each new layer learns its teacher's output, then the whole its
logits; before that, if asked for, the teacher learns the text.

The teacher runs as an SSE-H that keeps every layer as attention, so both read the same packed rows.
What a step does is a function of seed and step: an interrupted run ends in the same weights.
"""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler

from sse_rl.data.corpus import PackedText, Rows
from sse_rl.errors import Interrupted, UserError
from sse_rl.model import PackedInputs, SSEForCausalLM, load_balance_loss, packed_inputs
from sse_rl.model.mixer import SSEMixer
from sse_rl.recipe import Distill

Progress = Callable[[int, dict[str, float]], None]
Perplexities = dict[str, dict[str, float]]
TRAINED, ALIGNED, DISTILLED = "teacher, trained", "aligned", "distilled"
STATE, TEACHER = "state.pt", "teacher.pt"
MAX_LOGITS = 1 << 26
"""Logits alive at once, of teacher and student each."""


def distill(
    student: SSEForCausalLM,
    teacher: SSEForCausalLM,
    text: PackedText,
    held_out: Mapping[str, PackedText],
    *,
    options: Distill,
    seed: int,
    state: Path,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Perplexities:
    """Train `student` in place, and `teacher` for `options.teacher_steps` first; the perplexity of
    every text in `held_out`, of the teacher as it came and as trained, and of the student as
    converted, aligned and distilled.

    Both models in float32 and on one device. `state` is the folder that an interrupted call goes on
    from, its files replaced every `options.save_steps`; its removal is left to the caller.

    Args:
        progress: called with (step, metrics) every `options.logging_steps`; steps count through
            all stages.
        stopped: asked after every step whether to end.

    Raises:
        Interrupted: as `stopped` asked; unless `options.save_steps` is 0, the state is saved.
        UserError: `state` is damaged, or there is no layer to align.
        FloatingPointError: a loss is not finite.
    """
    job = _Distillation(student, teacher, text, options, seed)
    if options.align_steps and not job.mixers():
        raise UserError(
            f"distill.align_steps = {options.align_steps}: every layer stays attention, so "
            "there is none to align; use 0"
        )
    stages = [
        _Stage(TRAINED, options.teacher_steps, options.teacher_learning_rate, job.teach),
        _Stage(ALIGNED, options.align_steps, options.align_learning_rate, job.align),
        _Stage(DISTILLED, options.max_steps, options.learning_rate, job.imitate),
    ]
    state.mkdir(exist_ok=True)
    saved = _load(state / STATE)
    measured: Perplexities = saved.get("measured", {})
    if TRAINED in measured:
        teacher.load_state_dict(_load(state / TEACHER))
    if not measured:
        measured["teacher"] = job.perplexities(teacher, held_out)
        measured["converted"] = job.perplexities(student, held_out)
    done = 0
    for stage in stages:
        if stage.name not in measured and (stage.steps or stage.name != TRAINED):
            resumed = saved if saved.get("stage") == stage.name else {}
            if stage.name == ALIGNED and not resumed:
                job.adopt()
                job.centre_routers()
            _train(job, stage, resumed, measured, done, state / STATE, progress, stopped)
            measured[stage.name] = job.perplexities(job.learner(stage), held_out)
            if stage.name == TRAINED and options.save_steps:
                _save(state / TEACHER, teacher.state_dict())
        done += stage.steps
    return measured


@torch.no_grad()
def perplexity(
    model: SSEForCausalLM,
    text: PackedText,
    max_tokens: int,
    *,
    rows_at_once: int = 1,
    bf16: bool = False,
) -> float:
    """exp of the mean cross-entropy of the tokens of `text`, the first of a sequence apart, over
    the first rows that `max_tokens` pays for."""
    total, count = 0.0, 0
    for rows in text.in_order(max_tokens, rows_at_once):
        tokens, seqs = _to_device(rows, model.device)
        at, following = _predicted(tokens, seqs)
        with _autocast(model.device, bf16):
            logprobs, _ = model.logprobs(model.packed(tokens, seqs).hidden[at], following)
        total -= float(logprobs.sum())
        count += len(following)
    return math.exp(total / count)


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    steps: int
    learning_rate: float
    backward: Callable[[Rows, float], dict[str, Tensor]]
    """Adds the gradients of `scale` times a micro-batch's loss; metrics."""


def _train(
    job: _Distillation,
    stage: _Stage,
    resumed: Mapping[str, Any],
    measured: Perplexities,
    done: int,
    state: Path,
    progress: Progress | None,
    stopped: Callable[[], bool],
) -> None:
    """All steps of a stage, from where `resumed` left it; `done` steps came before it."""
    options, learner = job.options, job.learner(stage)
    if stage.steps == 0:
        return
    parameters = job.trainable(stage)
    adamw = torch.optim.AdamW(
        parameters,
        lr=stage.learning_rate,
        weight_decay=options.weight_decay,
        fused=parameters[0].is_cuda,
    )
    schedule = get_scheduler(
        options.lr_scheduler_type,
        adamw,
        num_warmup_steps=min(options.warmup_steps, stage.steps // 2),
        num_training_steps=stage.steps,
    )
    first = 0
    if resumed:
        first = resumed["step"]
        learner.load_state_dict(resumed["model"])
        adamw.load_state_dict(resumed["adamw"])
        schedule.load_state_dict(resumed["schedule"])
    began, tokens = time.monotonic(), 0
    learner.train()
    for step in range(first, stage.steps):
        metrics: dict[str, Tensor] = {}
        for part in range(options.gradient_accumulation_steps):
            number = (done + step) * options.gradient_accumulation_steps + part
            rows = job.text.batch(number, options.per_device_train_batch_size)
            tokens += len(rows.tokens)
            metrics = stage.backward(rows, 1 / options.gradient_accumulation_steps)
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        adamw.step()
        schedule.step()
        adamw.zero_grad(set_to_none=True)
        last, stop = step + 1 == stage.steps, stopped()
        if last or (step + 1) % options.logging_steps == 0:
            numbers = {name: float(x) for name, x in metrics.items()}
            _refuse_nonfinite(numbers, stage.name, step)
            if progress is not None:
                speed = tokens / (time.monotonic() - began)
                progress(done + step + 1, numbers | {"perf/tokens_per_s": speed})
        if options.save_steps and (last or stop or (step + 1) % options.save_steps == 0):
            kept = {"stage": stage.name, "step": step + 1, "measured": measured}
            parts = {"model": learner, "adamw": adamw, "schedule": schedule}
            _save(state, kept | {name: part.state_dict() for name, part in parts.items()})
        if stop:
            raise Interrupted
    learner.gradient_checkpointing_disable()
    learner.requires_grad_(learner is job.student).eval()


@dataclass(slots=True)
class _Distillation:
    """Teacher, student and text, and what one micro-batch of either stage does."""

    student: SSEForCausalLM
    teacher: SSEForCausalLM
    text: PackedText
    options: Distill
    seed: int

    def trainable(self, stage: _Stage) -> list[nn.Parameter]:
        """The parameters of a stage; only they require a gradient."""
        learner, all_of_it = self.learner(stage), stage.backward != self.align
        learner.requires_grad_(all_of_it)
        for _, mixer in self.mixers() if not all_of_it else ():
            mixer.requires_grad_(True)
        if all_of_it and self.options.gradient_checkpointing:
            learner.gradient_checkpointing_enable()
        return [p for p in learner.parameters() if p.requires_grad]

    def learner(self, stage: _Stage) -> SSEForCausalLM:
        return self.teacher if stage.backward == self.teach else self.student

    def mixers(self) -> list[tuple[int, SSEMixer]]:
        """The SSE layers and their places in the model."""
        layers = enumerate(self.student.model.layers)
        return [(i, layer.attn) for i, layer in layers if isinstance(layer.attn, SSEMixer)]

    def teach(self, rows: Rows, scale: float) -> dict[str, Tensor]:
        """The teacher learns the text itself: cross-entropy, per token."""
        tokens, seqs = self.to_device(rows)
        at, following = _predicted(tokens, seqs)
        with self.autocast():
            logprobs, _ = self.teacher.logprobs(
                self.teacher.packed(tokens, seqs).hidden[at], following
            )
        loss = -logprobs.mean()
        (scale * loss).backward()
        return {"loss": loss.detach()}

    def align(self, rows: Rows, scale: float) -> dict[str, Tensor]:
        """Each SSE layer gets the teacher's input to that layer; its loss is the squared error of
        its output over the teacher's squared output, so that all layers weigh the same."""
        mixers, errors, aux = dict(self.mixers()), [], []
        for layer, x, wanted, seqs in self.teacher_layers(rows, mixers):
            with self.autocast():
                mixed, routing = mixers[layer](x, seqs)
                error = F.mse_loss(mixed.float(), wanted.float()) / wanted.float().square().mean()
                balance = load_balance_loss(routing.probs, routing.ids)
            (scale * (error + self.student.config.aux_loss_coef * balance)).backward()
            errors.append(error.detach())
            aux.append(balance.detach())
        return {"loss": torch.stack(errors).mean(), "aux_loss": torch.stack(aux).mean()}

    def imitate(self, rows: Rows, scale: float) -> dict[str, Tensor]:
        """kl_coef * KL(teacher | student) + lm_coef * cross-entropy, per token, + the model's
        auxiliary loss."""
        options = self.options
        tokens, seqs = self.to_device(rows)
        at, following = _predicted(tokens, seqs)
        with self.autocast():
            with torch.no_grad():
                wanted = self.teacher.packed(tokens, seqs).hidden[at]
            out = self.student.packed(tokens, seqs)
            pairs = zip(out.router_probs, out.routing_ids.unbind(1), strict=True)
            aux = sum((load_balance_loss(*pair) for pair in pairs), torch.zeros_like(wanted[0, 0]))
            kl, ce = self.divergences(out.hidden[at], wanted, following)
        loss = options.kl_coef * kl + options.lm_coef * ce
        (scale * (loss + self.student.config.aux_loss_coef * aux)).backward()
        metrics = {"loss": loss, "kl": kl, "ce": ce, "aux_loss": aux}
        return {name: x.detach() for name, x in metrics.items()}

    def divergences(self, hidden: Tensor, wanted: Tensor, following: Tensor) -> tuple[Tensor, ...]:
        """Means over M tokens of the divergence, times temperature squared as Hinton et al. (arXiv
        1503.02531) do, and of the cross-entropy; the [M, V] logits are made in chunks, and again in
        the backward pass."""
        if self.options.kl_coef == 0:
            logprobs, _ = self.student.logprobs(hidden, following)
            return torch.zeros_like(logprobs[0]), -logprobs.mean()
        sums = hidden.new_zeros(2, dtype=torch.float32)
        rows = max(1, MAX_LOGITS // self.student.config.vocab_size)
        chunks = zip(hidden.split(rows), wanted.split(rows), following.split(rows), strict=True)
        for chunk in chunks:
            sums = sums + checkpoint(self._chunk, *chunk, use_reentrant=False)
        return (sums / len(following)).unbind()

    def _chunk(self, hidden: Tensor, wanted: Tensor, following: Tensor) -> Tensor:
        logits, t = self.student.logits(hidden), self.options.temperature
        soften = (lambda x: x) if t == 1 else (lambda x: x / t)  # each pass over [M, V] counts
        with torch.no_grad():
            theirs = F.log_softmax(soften(self.teacher.logits(wanted)), -1)
        ours = F.log_softmax(soften(logits), -1)
        kl = t * t * F.kl_div(ours, theirs, reduction="sum", log_target=True)
        own = ours if t == 1 else F.log_softmax(logits, -1)
        return torch.stack((kl, F.nll_loss(own, following, reduction="sum")))

    @torch.no_grad()
    def teacher_layers(
        self, rows: Rows, wanted: Container[int]
    ) -> Iterator[tuple[int, Tensor, Tensor, PackedInputs]]:
        """(layer, its normalised input [T, d], its attention's output [T, d], packing)."""
        tokens, seqs = self.to_device(rows)
        x = self.teacher.model.embeddings(tokens)
        layers: Any = self.teacher.model.layers
        for i, layer in enumerate(layers):
            with self.autocast():
                normed = layer.attn_norm(x)
                mixed = layer.attn(normed, seqs)
                x = x + mixed
                x = x + layer.mlp(layer.mlp_norm(x))
            if i in wanted:
                yield i, normed, mixed, seqs

    @torch.no_grad()
    def adopt(self) -> None:
        """What both have, the student takes from the teacher, which may have learned the text."""
        mixers = tuple(f"model.layers.{layer}.attn." for layer, _ in self.mixers())
        own = self.student.state_dict()
        for name, x in self.teacher.state_dict().items():
            if not name.startswith(mixers):
                own[name].copy_(x)

    @torch.no_grad()
    def centre_routers(self) -> None:
        """Takes the mean input's direction out of each router, which would otherwise send nearly
        all tokens to the partition that it favours."""
        mixers = dict(self.mixers())
        rows = self.text.batch(0, self.options.per_device_train_batch_size)
        for layer, x, _, _ in self.teacher_layers(rows, mixers):
            mean = F.normalize(x.float().mean(0), dim=0)
            router = mixers[layer].e_proj.weight
            router -= (router @ mean)[:, None] * mean

    def perplexities(
        self, model: SSEForCausalLM, held_out: Mapping[str, PackedText]
    ) -> dict[str, float]:
        options = self.options
        return {
            name: perplexity(
                model,
                text,
                options.eval_tokens,
                rows_at_once=options.per_device_train_batch_size,
                bf16=options.bf16,
            )
            for name, text in held_out.items()
        }

    def to_device(self, rows: Rows) -> tuple[Tensor, PackedInputs]:
        return _to_device(rows, self.student.device)

    def autocast(self) -> AbstractContextManager[Any]:
        return _autocast(self.student.device, self.options.bf16)


def _to_device(rows: Rows, device: torch.device) -> tuple[Tensor, PackedInputs]:
    return torch.from_numpy(rows.tokens).to(device), packed_inputs(rows.lengths, device=device)


def _autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def _predicted(tokens: Tensor, seqs: PackedInputs) -> tuple[Tensor, Tensor]:
    """Places [M] whose next token is in the same sequence, and those next tokens [M]."""
    following = (seqs.positions > 0).nonzero()[:, 0]
    return following - 1, tokens[following]


def _refuse_nonfinite(numbers: Mapping[str, float], stage: str, step: int) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"distillation, stage {stage}, step {step + 1}: {name} is {value}; "
                "try a lower learning rate"
            )


def _save(path: Path, state: dict[str, Any]) -> None:
    """Replaces `path` in one step."""
    beside = path.with_name(path.name + ".partial")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged ({reason}); remove it to distil anew") from None
