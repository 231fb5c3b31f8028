"""A checkpoint in a GGUF file, as llama.cpp writes them: weights, tokenizer, which token ends."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from sse_rl.data import tokenizer as tokenizers
from sse_rl.data.tokenizer import CHAT_TEMPLATE, PAD, TURN_END, TURN_START, named_tokenizer
from sse_rl.model.convert import load_teacher

WIDTH, INNER, HEADS, LAYERS = 32, 64, 2, 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A Llama of one layer whose words are bytes, `th` and three special tokens."""
    path = tmp_path / "model.gguf"
    words = [PAD, TURN_START, TURN_END, *tokenizers._byte_alphabet(), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control] * 3 + [normal] * (len(words) - 3))
    writer.add_token_merges(["t h"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, x in weights(len(words)).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(words: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (words, WIDTH), "output_norm": (WIDTH,), "output": (words, WIDTH)}
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}"] = (WIDTH,)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = (WIDTH, WIDTH)
    shapes |= {f"blk.0.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")}
    shapes["blk.0.ffn_down"] = (WIDTH, INNER)
    return {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def test_the_token_that_ends_is_the_one_that_the_file_names(file, monkeypatch):
    tokenizer = named_tokenizer(str(file), None)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        TURN_END,
        TURN_START,
        TURN_END,
    )
    assert tokenizer.decode(tokenizer("the end").input_ids) == "the end"

    def as_transformers_5_17(**place: str):
        tokenizer.bos_token, tokenizer.eos_token = TURN_END, TURN_START
        return tokenizer

    monkeypatch.setattr(tokenizers.AutoTokenizer, "from_pretrained", as_transformers_5_17)
    again = named_tokenizer(str(file), None)
    assert (again.eos_token, again.bos_token, again.unk_token) == (TURN_END, TURN_START, PAD)


def test_weights_are_those_of_the_file(file):
    found = load_teacher(str(file)).state_dict()["model.layers.0.mlp.up_proj.weight"]
    wanted = torch.from_numpy(weights(260)["blk.0.ffn_up.weight"])
    assert torch.equal(found, wanted)
