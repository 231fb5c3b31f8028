"""The Ray actor around one engine: it moves requests in and completions out, nothing else."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sse_rl.pipeline.weights import WeightsIndex, unpack
from sse_rl.recipe import Rollout
from sse_rl.types import Completion, Request

GATHER_S = 0.2


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a worker needs to build its engine on whatever node it lands."""

    config: dict[str, Any]
    """SSEConfig as a dict; the weights come by `set_weights`."""
    dtype: str
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    rollout: Rollout
    tokenizer: Any = None
    """A transformers tokenizer; needed for stop strings alone."""


class RolloutWorker:
    """Owns an engine. Every method returns within a bounded time, so that silence means death."""

    def __init__(self, spec: EngineSpec) -> None:
        from sse_rl.model import SSEConfig, SSEForCausalLM
        from sse_rl.rollout.engine import Engine

        if spec.rollout.num_threads is not None:
            torch.set_num_threads(spec.rollout.num_threads)
        device = "cuda" if spec.rollout.num_gpus_per_worker > 0 else "cpu"
        with torch.device(device):
            model = SSEForCausalLM(SSEConfig.from_dict(spec.config))
        model = model.to(getattr(torch, spec.dtype)).eval().requires_grad_(False)
        rollout = spec.rollout
        pages_per_seq = -(-spec.max_model_len // rollout.page_size)
        self.engine = Engine(
            model,
            max_num_seqs=rollout.max_num_seqs,
            num_pages=rollout.num_pages or rollout.max_num_seqs * pages_per_seq + 2,
            page_size=rollout.page_size,
            max_num_batched_tokens=rollout.max_num_batched_tokens,
            eos_token_ids=spec.eos_token_ids,
            max_model_len=spec.max_model_len,
            decode=spec.tokenizer.decode if spec.tokenizer is not None else None,
            state_dtype=getattr(torch, rollout.state_dtype),
        )

    def set_weights(self, index: WeightsIndex, buffer: np.ndarray) -> int:
        """Swap in a published version between two decode steps; returns it."""
        self.engine.set_weights(unpack(index, buffer), index.version)
        return index.version

    def advance(self, requests: list[Request], budget_s: float) -> list[Completion]:
        """Take in `requests` and decode until something finishes, or for `budget_s` seconds.

        What finishes is gathered for `GATHER_S`, or until it is a quarter of what runs together,
        unless nothing else is left to decode: where many sequences run, one ends with nearly every
        token, and a call a token would idle the device.
        """
        for request in requests:
            self.engine.add(request)
        began, finished = time.monotonic(), []
        while True:
            finished += self.engine.step()
            lasted = time.monotonic() - began
            many = 4 * len(finished) >= self.engine.stats.slots
            if many or not self.engine.busy or lasted > (GATHER_S if finished else budget_s):
                return finished

    def abort(self, request_ids: list[str]) -> None:
        """Forget requests; those that finished meanwhile are not an error."""
        for request_id in request_ids:
            with suppress(KeyError):
                self.engine.abort(request_id)
