"""Names that checkpoints share, a round trip through a folder, and refusals that name the key."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sse_rl.model import SSEConfig, SSEForCausalLM

BLOCK = {
    "attn_norm.weight",
    "mlp_norm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
}
SSE = BLOCK | {
    "attn.q_proj.weight",
    "attn.k_proj.weight",
    "attn.v_proj.weight",
    "attn.o_proj.weight",
    "attn.e_proj.weight",
    "attn.lora_q_proj.0.weight",
    "attn.lora_q_proj.1.weight",
    "attn.lora_k_proj.0.weight",
    "attn.lora_k_proj.1.weight",
    "attn.g_proj.0.weight",
    "attn.g_proj.1.weight",
    "attn.o_norm.weight",
    "attn.q_conv1d_shared.weight",
    "attn.k_conv1d_shared.weight",
}
GLA = SSE | {
    "attn.gk_proj.0.0.weight",
    "attn.gk_proj.0.1.weight",
    "attn.gk_proj.0.1.bias",
    "attn.gk_proj.1.0.weight",
    "attn.gk_proj.1.1.weight",
    "attn.gk_proj.1.1.bias",
}
GDN = SSE | {"attn.a_proj.weight", "attn.b_proj.weight", "attn.A_log", "attn.dt_bias"}
SOFTMAX = BLOCK | {f"attn.{x}_proj.{y}" for x in "qkv" for y in ("weight", "bias")}
SOFTMAX |= {"attn.o_proj.weight"}


@pytest.mark.parametrize("kind,names", [("gla", GLA), ("gdn", GDN)])
def test_parameters_have_the_names_of_the_reference(tiny_config, kind, names):
    config = tiny_config(linear_attn_type=kind)
    expected = {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(4):
        block = SOFTMAX if layer == 2 else names
        expected |= {f"model.layers.{layer}.{name}" for name in block}
    parameters = SSEForCausalLM(config).state_dict()
    assert parameters.keys() == expected
    shapes = {name.split(".", 3)[-1]: tuple(p.shape) for name, p in parameters.items()}
    assert shapes["attn.lora_q_proj.0.weight"] == (config.value_dim, 32)
    assert shapes["attn.lora_q_proj.1.weight"] == (16, config.value_dim)
    assert shapes["attn.q_conv1d_shared.weight"] == (16, 1, 4)
    assert shapes["attn.o_norm.weight"] == (config.value_dim,)


def test_the_defaults_are_those_of_the_reference():
    config = SSEConfig()
    assert config.num_v_heads == 6 and config.value_dim == 256 and config.attn is None
    assert config.mlp_width == 5632
    assert config.sse_layers == list(range(24))
    attn = SSEConfig(attn={"layers": [5], "num_heads": 16}).attn
    assert attn["num_kv_heads"] == 16 and attn["head_dim"] == 128
    assert attn["rope_theta"] == 10000 and attn["window_size"] is None


def test_a_saved_model_is_loaded_by_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    given, read = model.config.to_dict(), config.to_dict()
    assert all(read[key] == given[key] for key in given.keys() - {"dtype", "_name_or_path"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_tied_embeddings_stay_tied_through_a_folder(tiny_config, tmp_path):
    model = SSEForCausalLM(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_an_fp32_head_keeps_its_weight_and_multiplies_it_in_fp32(tiny_config, tmp_path):
    SSEForCausalLM(tiny_config(fp32_head=True)).save_pretrained(tmp_path)
    loaded = SSEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.float32
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    hidden = torch.randn(3, loaded.config.hidden_size).bfloat16()
    exact = hidden.double() @ loaded.lm_head.weight.double().T
    torch.testing.assert_close(loaded.logits(hidden).double(), exact, rtol=1e-5, atol=1e-6)


def test_a_cast_of_the_model_leaves_an_fp32_head_as_it_is(tiny_config):
    model = SSEForCausalLM(tiny_config(fp32_head=True))
    weight = model.lm_head.weight.clone()
    for cast in (model.bfloat16, model.half, lambda: model.to("cpu", torch.bfloat16)):
        cast()
        assert model.lm_head.weight.dtype == torch.float32
        assert torch.equal(model.lm_head.weight, weight)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.double().lm_head.weight.dtype == torch.float64


def test_a_bf16_model_has_logits_of_fp32(tiny_config):
    model = SSEForCausalLM(tiny_config(tie_word_embeddings=True)).bfloat16()
    hidden, targets = torch.randn(3, model.config.hidden_size).bfloat16(), torch.arange(3)
    exact = hidden.double() @ model.lm_head.weight.double().T
    torch.testing.assert_close(model.logits(hidden).double(), exact, rtol=1e-5, atol=1e-6)
    logprobs = exact.log_softmax(-1).diagonal()
    torch.testing.assert_close(model.logprobs(hidden, targets)[0].double(), logprobs)


def test_keys_of_the_reference_are_accepted_and_kept():
    config = SSEConfig(attn_mode="chunk", fuse_norm=True, sse_implementation="varlen")
    assert config.to_dict()["attn_mode"] == "chunk" and config.fuse_norm


def test_decays_start_in_the_range_of_mamba(tiny_config):
    mixer = SSEForCausalLM(tiny_config(linear_attn_type="gdn")).model.layers[0].attn
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert (steps >= 0.00099).all() and (steps <= 0.101).all()
    assert (mixer.A_log.exp() > 0).all() and (mixer.A_log.exp() < 16.001).all()


@pytest.mark.parametrize(
    "changes,key",
    [
        ({"num_writer": 1, "num_reader": 2}, "num_reader"),
        ({"num_writer": 5, "num_reader": 5}, "num_writer"),
        ({"num_writer": 0, "num_reader": 0}, "num_writer"),
        ({"num_sparse_partition": 300}, "num_sparse_partition"),
        ({"num_v_heads": 7}, "num_v_heads"),
        ({"linear_attn_type": "mamba"}, "linear_attn_type"),
        ({"row_topk": 300}, "row_topk"),
        ({"row_topk": 2.5}, "row_topk"),
        ({"num_writer": 1.0, "num_reader": 1.0}, "num_writer"),
        ({"row_topk": 4, "linear_attn_type": "gdn"}, "row_topk"),
        ({"gate_after_norm": True}, "gate_after_norm"),
        ({"use_q_softmax": True}, "use_q_softmax"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"fp32_head": True, "tie_word_embeddings": True}, "fp32_head"),
        ({"attn": {"num_heads": 8}}, "attn.layers"),
        ({"attn": {"layers": [1]}}, "attn.num_heads"),
        ({"attn": {"layers": [24], "num_heads": 8}}, "attn.layers"),
        ({"attn": {"layers": [-1], "num_heads": 8}}, "attn.layers"),
        ({"attn": {"layers": [1, 1], "num_heads": 8}}, "attn.layers"),
        ({"attn": {"layers": [1], "num_heads": 8, "num_kv_heads": 3}}, "attn.num_kv_heads"),
        ({"attn": {"layers": [1], "num_heads": 8, "window": 3}}, "attn.window_size"),
        ({"attn": {"layers": [1], "num_heads": 8, "window_size": 0}}, "attn.window_size"),
        ({"attn": {"layers": [1], "num_heads": 8, "head_dim": 5}}, "attn.head_dim"),
    ],
)
def test_an_impossible_configuration_names_its_key(changes, key):
    with pytest.raises(ValueError, match=key):
        SSEConfig(**changes)


def test_a_checkpoint_of_another_head_width_is_refused_by_name(gla_model, tiny_config, tmp_path):
    gla_model.save_pretrained(tmp_path)
    other = tiny_config()
    other.attn["head_dim"] = 16
    with pytest.raises(ValueError, match=r"attn\.head_dim"):
        SSEForCausalLM.from_pretrained(tmp_path, config=other)
