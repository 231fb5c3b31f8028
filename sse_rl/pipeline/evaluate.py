"""Evaluations on Ray: sse_eval's protocol over the rollout workers."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors import SafetensorError
from sse_eval import EvaluationError, SampleOutput, SampleRequest
from sse_eval.types import Message

from sse_rl.data.prompts import chat, tokenize
from sse_rl.errors import UserError
from sse_rl.model import SSEForCausalLM
from sse_rl.pipeline import cluster
from sse_rl.pipeline.checkpoint import saved_steps, step_folder
from sse_rl.pipeline.rollouts import RolloutPool
from sse_rl.rollout.worker import EngineSpec, RolloutWorker
from sse_rl.types import Completion, Request, SamplingParams

CHANNEL = "eval"
POLL_S = 1.0
SHARING = 8
"""Samples whose prompt is prefilled once, at most: with more, few problems leave workers idle."""


@dataclass(frozen=True, slots=True)
class Prompter:
    """From messages to what the model reads."""

    tokenizer: Any
    system_prompt: str | None = None
    chat_template: bool = True
    """False hands a base model the messages' text alone."""

    def render(self, messages: Sequence[Message]) -> str:
        if not self.chat_template:
            return "\n\n".join(message["content"] for message in messages)
        if not self.tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template: --no-chat-template")
        return chat(messages, self.tokenizer, self.system_prompt)

    def token_ids(self, prompt: str) -> tuple[int, ...]:
        if self.chat_template:  # it has written the special tokens already
            return tokenize(prompt, self.tokenizer)
        return tuple(self.tokenizer(prompt)["input_ids"])


@dataclass(slots=True)
class PoolGenerator:
    """sse_eval's Generator over a pool of rollout workers: sample-level, in any order."""

    pool: RolloutPool
    prompter: Prompter
    max_context: int | None
    interrupted: Callable[[], None] = lambda: None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    _calls: int = 0

    def render(self, messages: Sequence[Message]) -> str:
        return self.prompter.render(messages)

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[SampleOutput]:
        """Raises UserError, before the first sample, where prompt and answer exceed the context."""
        asked: dict[str, tuple[str, dict[int, SampleRequest]]] = {}
        self._calls += 1  # a late answer to a call that was given up must not pass for one of this
        for number, samples in enumerate(_batches(requests)):
            first = samples[0]
            prompt = self.render(first.messages)
            token_ids = self.prompter.token_ids(prompt)
            if self.max_context and len(token_ids) + first.max_tokens > self.max_context:
                raise UserError(
                    f"problem {first.id}: its prompt of {len(token_ids)} tokens and max_tokens "
                    f"{first.max_tokens} exceed the model's context of {self.max_context}: lower "
                    "--max-tokens"
                )
            name = f"{CHANNEL}/{self._calls}/{number}"
            asked[name] = prompt, dict(enumerate(samples))
            params = SamplingParams(
                n=len(samples),
                temperature=first.temperature,
                top_p=first.top_p,
                max_tokens=first.max_tokens,
                stop=self.stop,
                stop_token_ids=self.stop_token_ids,
                seeds=tuple(request.seed for request in samples),
            )
            self.pool.submit(Request(name, token_ids, params), apart=True)
        wanted, ready = len(requests), deque[Completion]()
        try:
            while wanted:
                self.interrupted()
                # What is yielded is graded before the next: the workers must not wait for that.
                for (completion,) in self.pool.poll(CHANNEL, 0.0 if ready else POLL_S):
                    ready.append(completion)
                if not ready:
                    continue
                completion = ready.popleft()
                prompt, samples = asked[completion.request_id]
                request = samples.pop(completion.index, None)
                if request is not None:  # a lost worker's samples come again
                    wanted -= 1
                    yield self._output(completion, request, prompt)
        finally:
            self.pool.cancel(CHANNEL)

    def _output(self, completion: Completion, request: SampleRequest, prompt: str) -> SampleOutput:
        ids = completion.token_ids.tolist()
        decode = lambda part: self.prompter.tokenizer.decode(part, skip_special_tokens=True)
        return SampleOutput(
            id=request.id,
            sample=request.sample,
            completion=decode(ids),
            tokens=len(ids),
            finish_reason=completion.finish_reason,
            prompt=prompt,
            cuts={b: len(decode(ids[:b])) for b in request.budgets if b < len(ids)},
        )


def _batches(requests: Sequence[SampleRequest]) -> list[list[SampleRequest]]:
    """Neighbours that differ in sample and seed alone, `SHARING` at most."""
    alike = [list(group) for _, group in groupby(requests, lambda r: replace(r, sample=0, seed=0))]
    return [group[i : i + SHARING] for group in alike for i in range(0, len(group), SHARING)]


def make_pool(spec: EngineSpec) -> RolloutPool:
    """Rollout workers as the recipe's rollout section says."""
    rollout = spec.rollout
    actor = ray.remote(RolloutWorker).options(
        num_cpus=rollout.num_cpus_per_worker,
        num_gpus=rollout.num_gpus_per_worker,
        runtime_env=cluster.KEEP_FREED_MEMORY,
    )
    return RolloutPool(
        lambda: actor.remote(spec),
        num_workers=rollout.num_workers,
        capacity=rollout.max_num_seqs,
        timeout_s=rollout.timeout_s,
        max_restarts=rollout.max_restarts,
    )


def model_folder(path: str) -> Path:
    """The folder with config.json: `path` itself, a run's export or newest checkpoint, or a
    checkpoint's model. Raises UserError naming `path` if there is none."""
    from sse_rl.model.convert import FAMILIES

    root = Path(path)
    steps = saved_steps(root)
    candidates = [root, root / "model", root / "export"]
    candidates += [step_folder(root, steps[-1]) / "model"] if steps else []
    for folder in candidates:
        if (folder / "config.json").is_file():
            try:
                model_type = json.loads((folder / "config.json").read_text()).get("model_type")
            except (ValueError, AttributeError) as error:
                raise UserError(f"{folder / 'config.json'}: damaged ({error})") from None
            if model_type == "sse":
                return folder
            remedy = f"; one that computes the same is written by: {_conversion(folder)}"
            raise UserError(
                f"{folder}: model_type {model_type!r} is not an SSE-H model"
                f"{remedy if model_type in FAMILIES else ''}"
            )
    looks_foreign = root.suffix == ".gguf" or (not root.parent.exists() and len(root.parts) == 2)
    remedy = f"; a GGUF file or a model of a hub becomes one by: {_conversion(root)}"
    raise UserError(
        f"{path}: no model there (looked for config.json in it, model/ and export/)"
        f"{remedy if looks_foreign else ''}"
    )


def _conversion(source: Path) -> str:
    return f"sse-rl convert {source} FOLDER --attention-layers all"


def load_policy(folder: Path, dtype: torch.dtype | None = None) -> SSEForCausalLM:
    """The model in `folder`. Raises UserError if its files are damaged or of another model."""
    try:
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        model, info = SSEForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise ValueError(f"it lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}")
        return model
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: no model can be loaded from there: {error}") from None


def as_user_error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call, and turn the ways in which sse_eval refuses bad input into UserError."""
    try:
        return function(*args, **kwargs)
    except (ValueError, EvaluationError) as error:
        raise UserError(str(error)) from None
