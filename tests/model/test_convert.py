"""Conversion of tiny random teachers: what is kept exactly, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sse_kernels import causal_conv
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sse_rl.errors import UserError
from sse_rl.model.convert import as_softmax, convert, kept_layers, load_teacher
from sse_rl.model.mixer import SSEMixer
from sse_rl.recipe import Convert

KEYS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


def teacher(family: str = "llama", **changes: Any) -> PreTrainedModel:
    config, model, keys = FAMILIES[family]
    torch.manual_seed(0)
    made = model(config(**(KEYS | keys | changes))).eval()
    for parameter in made.parameters():
        if parameter.dim() == 1:  # norms and biases, which would start at 1 and 0
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return made.requires_grad_(False)


def options(**keys: Any) -> Convert:
    return Convert.model_validate({"source": "teacher", **keys})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_layer_kept_the_logits_are_the_teachers(family: str, tied: bool):
    original = teacher(family, tie_word_embeddings=tied)
    ids = torch.randint(50, (2, 37))
    with torch.no_grad():
        ours = as_softmax(original, "teacher")(ids).logits
    # 1.2e-5 measured
    torch.testing.assert_close(ours, original(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("linear", ["gla", "gdn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_layer_takes_its_projections_from_attention(family: str, linear: str):
    original = teacher(family)
    student = convert(original, options(attention_layers=[1], linear_attn_type=linear))
    attention, mixer = original.model.layers[0].self_attn, student.model.layers[0].attn
    assert isinstance(mixer, SSEMixer)
    width = student.config.head_dim
    wanted = attention.v_proj.weight.repeat(2, 1)  # one head for both queries
    assert torch.equal(mixer.v_proj.weight, wanted)
    if family != "qwen3":
        assert torch.equal(mixer.k_proj.weight, attention.k_proj.weight.repeat(2, 1))
        assert torch.equal(mixer.q_proj.weight, attention.q_proj.weight)
    assert mixer.o_proj.weight.shape == (32, 2 * width)


def test_queries_that_were_normalised_keep_their_size():
    original = teacher("qwen3", initializer_range=1.0)
    student = convert(original, options(attention_layers=[1]))
    x = original.model.layers[0].input_layernorm(torch.randn(4000, 32))
    attention, mixer = original.model.layers[0].self_attn, student.model.layers[0].attn
    normed = attention.q_norm(attention.q_proj(x).unflatten(-1, (2, 32)))
    ours = mixer.q_proj(x).unflatten(-1, (2, 32))
    ratio = ours.square().mean((0, 2)).sqrt() / normed.square().mean((0, 2)).sqrt()
    torch.testing.assert_close(ratio, torch.ones(2), rtol=0, atol=0.1)


@pytest.mark.parametrize("linear", ["gla", "gdn"])
def test_both_streams_start_equal_and_forget_slowly(linear: str):
    mixer = convert(teacher(), options(linear_attn_type=linear)).model.layers[0].attn
    mixer.requires_grad_(False)
    x = torch.randn(5, 32)
    assert not mixer.lora_q_proj(x).any() and not mixer.lora_k_proj(x).any()
    if linear == "gla":
        decay = torch.nn.functional.logsigmoid(mixer.gk_proj[0](x)) / 16
    else:
        rate = torch.nn.functional.softplus(mixer.a_proj(x) + mixer.dt_bias)
        decay = -mixer.A_log.exp() * rate
    assert decay.exp().min() > 0.98  # half of it in 64 tokens
    halves = torch.log(torch.tensor(0.5)) / decay[0]
    assert float(halves.min()) == pytest.approx(64, rel=0.01)
    assert float(halves.max()) == pytest.approx(4096, rel=0.01)


def test_the_short_convolution_starts_as_the_identity():
    mixer = convert(teacher(), options()).model.layers[0].attn
    x = torch.randn(7, 32)
    for conv in (mixer.q_conv1d_shared, mixer.k_conv1d_shared):
        y, _ = causal_conv(x, conv.weight, cu_seqlens=torch.tensor([0, 7]))
        torch.testing.assert_close(y, x)


def test_a_conversion_is_the_same_each_time_and_leaves_the_random_state_alone():
    original, before = teacher(), torch.random.get_rng_state()
    first, second = (convert(original, options(), seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_kept_layers_are_a_count_evenly_spread_or_a_list():
    assert kept_layers(None, 12) == [2, 6, 10]
    assert kept_layers(2, 12) == [3, 9]
    assert kept_layers(0, 12) == []
    assert kept_layers([7, 3], 12) == [3, 7]
    assert kept_layers(12, 12) == list(range(12))
    assert kept_layers(None, 2) == [1]
    with pytest.raises(UserError, match=r"layer 12 is outside 0\.\.11"):
        kept_layers([12], 12)
    with pytest.raises(UserError, match="attention_layers = 13: the model has 12 layers"):
        kept_layers(13, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, r"o_proj\.bias has no place"),
        ({"mlp_bias": True}, r"gate_proj\.bias has no place"),
        ({"head_dim": 24}, "heads of width 24; the kernels of SSE layers serve 16, 32"),
    ],
)
def test_what_sse_cannot_express_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        convert(teacher("llama", **changes), options())


def test_sliding_windows_are_refused():
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    with pytest.raises(UserError, match="sliding-window layers: only full attention"):
        convert(teacher("qwen2", **changes), options())


def test_odd_head_widths_work_where_every_layer_stays():
    original = teacher("llama", head_dim=24)
    ids = torch.randint(50, (1, 9))
    ours = as_softmax(original, "teacher")(ids).logits
    torch.testing.assert_close(ours, original(ids).logits, rtol=0, atol=1e-4)


def test_an_unknown_family_is_refused(tmp_path: Path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"family 'gpt2'.* llama, qwen2, qwen3"):
        load_teacher(str(tmp_path))


def test_a_checkpoint_is_read_from_its_folder(tmp_path: Path):
    original = teacher("qwen3", tie_word_embeddings=True)
    original.save_pretrained(tmp_path)
    read = load_teacher(str(tmp_path))
    assert torch.equal(read.lm_head.weight, original.lm_head.weight)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("lm_head.weight", r"lm_head\.weight is missing; .* tie_word_embeddings"),
        ("model.layers.2.mlp.up_proj.weight", r"1 weights are missing, .*\.mlp\.up_proj"),
    ],
)
def test_missing_weights_are_named(tmp_path: Path, lost: str, message: str):
    teacher(tie_word_embeddings=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_teacher(str(tmp_path))


def test_a_source_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing\.gguf: no such file"):
        load_teacher(str(tmp_path / "nothing.gguf"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(range(100)))
    with pytest.raises(UserError, match=r"cut\.gguf: cannot be read as a model"):
        load_teacher(str(tmp_path / "cut.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: cannot be read as a model"):
        load_teacher(str(tmp_path / "empty"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"several GGUF files, name one of a\.gguf, b\.gguf"):
        load_teacher(str(tmp_path))
