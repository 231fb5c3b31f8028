from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sse_rl.model import SSEConfig, SSEForCausalLM
from sse_rl.rollout.engine import Engine
from sse_rl.types import Request, SamplingParams

VOCAB = 64


@pytest.fixture
def tiny_model() -> Callable[..., SSEForCausalLM]:
    """Builds a model of width 32: SSE, attention, SSE."""

    def build(kind: str = "gla", seed: int = 0, **options: Any) -> SSEForCausalLM:
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "hidden_size": 32,
            "head_dim": 16,
            "num_heads": 2,
            "num_sparse_partition": 4,
            "num_writer": 1,
            "num_reader": 1,
            "linear_attn_type": kind,
            "attn": {"layers": [1], "num_heads": 2},
            "num_hidden_layers": 3,
            "intermediate_size": 64,
            "vocab_size": VOCAB,
            "initializer_range": 0.1,
        }
        return SSEForCausalLM(SSEConfig(**settings | options)).requires_grad_(False)

    return build


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """Builds an engine with room for 8 samples of 256 tokens."""

    def build(model: SSEForCausalLM, **options: Any) -> Engine:
        settings: dict[str, Any] = {
            "max_num_seqs": 8,
            "num_pages": 33,
            "page_size": 64,
            "max_num_batched_tokens": 256,
            "eos_token_ids": (2,),
            "max_model_len": 256,
        }
        return Engine(model, **settings | options)

    return build


@pytest.fixture
def make_request() -> Callable[..., Request]:
    """Builds a request with a random prompt of `length` tokens; both depend on `number` alone."""

    def build(number: int, length: int, **params: Any) -> Request:
        prompt = np.random.default_rng(number).integers(3, VOCAB, length)
        params = {"seed": number, "max_tokens": 12} | params
        return Request(f"r{number}", tuple(prompt.tolist()), SamplingParams(**params))

    return build
