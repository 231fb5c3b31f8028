"""A tiny hybrid that every test of the model builds from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sse_rl.model import SSEConfig, SSEForCausalLM

VARIANTS = {
    "gla": {"linear_attn_type": "gla"},
    "gdn": {"linear_attn_type": "gdn"},
    "gla-wide": {
        "linear_attn_type": "gla",
        "num_v_heads": 4,
        "expand_v": 2,
        "num_sparse_partition": 6,
        "num_writer": 2,
        "num_reader": 2,
        "row_topk": 4,
        "window": 24,
    },
    "gdn-wide": {
        "linear_attn_type": "gdn",
        "num_v_heads": 4,
        "num_writer": 2,
        "num_reader": 2,
        "allow_neg_eigval": True,
        "gate_after_norm": True,
        "use_output_gate": False,
        "use_short_conv": False,
    },
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config() -> Callable[..., SSEConfig]:
    """Three SSE layers around one softmax layer; keywords override."""

    def build(**changes: Any) -> SSEConfig:
        attn = {
            "layers": [2],
            "num_heads": 4,
            "num_kv_heads": 2,
            "window_size": changes.pop("window", None),
            "qkv_bias": True,
        }
        keys: dict[str, Any] = {
            "hidden_size": 32,
            "head_dim": 8,
            "num_heads": 2,
            "num_sparse_partition": 4,
            "num_writer": 1,
            "num_reader": 1,
            "use_short_conv": True,
            "num_hidden_layers": 4,
            "intermediate_size": 48,
            "vocab_size": 50,
            "attn": attn,
            "initializer_range": 0.2,
            "pad_token_id": 0,
        }
        return SSEConfig(**(keys | changes))

    return build


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, tiny_config: Callable[..., SSEConfig]) -> SSEForCausalLM:
    torch.manual_seed(0)
    return SSEForCausalLM(tiny_config(**VARIANTS[request.param])).eval()


@pytest.fixture
def gla_model(tiny_config: Callable[..., SSEConfig]) -> SSEForCausalLM:
    torch.manual_seed(0)
    return SSEForCausalLM(tiny_config()).eval()
