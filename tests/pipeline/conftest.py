from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sse_rl.data.tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> str:
    """A folder with a random Llama that reads bytes: a teacher to convert."""
    folder, tokenizer = tmp_path_factory.mktemp("teacher"), byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
