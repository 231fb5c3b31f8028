"""Weights surgery: a softmax Transformer of the Llama or Qwen family becomes an SSE-H model.

Everything but the token mixing of the converted layers is copied as it is. A converted layer takes
q, k, v and o from the attention it replaces, each key and value head repeated for the queries that
shared it, and starts with decays near 1, low-rank differences of 0 and an indifferent router. What
else softmax attention did there is for distillation to teach (`sse_rl.pipeline.distill`).
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import torch
from sse_kernels.activations import DECAY_TEMPERATURE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sse_rl.data.tokenizer import location
from sse_rl.errors import UserError
from sse_rl.model.configuration import SSEConfig
from sse_rl.model.mixer import SSEMixer
from sse_rl.model.modeling import SSEForCausalLM
from sse_rl.recipe import Convert

FAMILIES = ("llama", "qwen2", "qwen3")
_UNREADABLE = (OSError, ValueError, KeyError, ImportError, IndexError, struct.error)
"""What reading a damaged file raises; the last two from a GGUF file that was cut off."""
HALF_LIVES = (64, 4096)
"""Tokens: what the channels of a head forget half of, from first to last, in equal ratios."""
OUTPUT_SCALE = 0.05
"""Of a converted layer's normalised heads at the start: attention averages values, so its heads are
far smaller than the 1 that o_norm gives. Divergence from SmolLM2-135M on four GSM8K problems, one
layer in four kept: SSE-GLA 8.9 nats a token at 1, 8.0 at 0.1, 4.1 at 0.05, 4.2 at 0.03, 5.8 at 0;
SSE-GDN 11.1 at 1, 4.3 at 0.1, 3.6 at 0.05."""
_TOP = {
    "model.embed_tokens.weight": "model.embeddings.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    r"input_layernorm\.weight": "attn_norm.weight",
    r"post_attention_layernorm\.weight": "mlp_norm.weight",
    r"mlp\.(gate|up|down)_proj\.weight": r"mlp.\1_proj.weight",
    r"self_attn\.([qkvo])_proj\.weight": r"attn.\1_proj.weight",
    r"self_attn\.([qkv])_proj\.bias": r"attn.\1_proj.bias",
    r"self_attn\.([qk])_norm\.weight": r"attn.\1_norm.weight",
}
"""Patterns below `model.layers.<i>.` and our names, for FAMILIES."""


def convert(teacher: PreTrainedModel, options: Convert, *, seed: int = 0) -> SSEForCausalLM:
    """An SSE-H of `teacher`'s weights in float32; with all layers kept, the teacher itself.

    Raises:
        UserError: the teacher has a part that SSE-H cannot express, or a kept layer is not there.
    """
    config = converted_config(teacher.config, options)
    drawn = "cpu" if config.sse_layers else "meta"  # as the teacher has all the rest
    with torch.random.fork_rng(devices=[]), torch.device(drawn):
        torch.manual_seed(seed)
        student = SSEForCausalLM(config).float().eval()
    copied = {}
    for name, x in teacher.state_dict().items():
        ours = _renamed(name)
        if ours is None:
            raise UserError(f"{options.source}: its tensor {name} has no place in an SSE-H model")
        copied[ours] = x.detach().float().clone()
    for index in config.sse_layers:
        mixer, block = student.model.layers[index].attn, f"model.layers.{index}."
        assert isinstance(mixer, SSEMixer)
        attention = {
            name: copied.pop(name) for name in [*copied] if name.startswith(f"{block}attn.")
        }
        attention = {name.removeprefix(f"{block}attn."): x for name, x in attention.items()}
        projections = _projections(attention, copied[f"{block}attn_norm.weight"], config)
        copied |= {f"{block}attn.{name}": x for name, x in projections.items()}
        _start(mixer)
    own = student.state_dict()
    for name, x in copied.items():
        if name not in own or own[name].shape != x.shape:
            raise UserError(
                f"{options.source}: its tensor {name} {list(x.shape)} has no place in an SSE-H "
                "model of this configuration"
            )
    student.load_state_dict(copied, strict=False, assign=not config.sse_layers)
    student.tie_weights()
    return student


def as_softmax(teacher: PreTrainedModel, source: str) -> SSEForCausalLM:
    """The teacher itself as this package runs it: packed rows, paged keys, the same logits."""
    layers = list(range(teacher.config.num_hidden_layers))
    return convert(teacher, Convert(source=source, attention_layers=layers))


def load_teacher(source: str) -> PreTrainedModel:
    """The model in a folder, under a hub id or in a GGUF file (or a folder with one), in float32.

    Raises:
        UserError: it cannot be read, is of another family, or lacks weights.
    """
    teacher_config(source)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **location(source), dtype=torch.float32, output_loading_info=True
        )
    except (*_UNREADABLE, RuntimeError) as error:
        raise UserError(f"{source}: cannot be loaded: {_line(error)}") from None
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing == ["lm_head.weight"]:
        raise UserError(
            f"{source}: lm_head.weight is missing; if the head shares the embeddings, "
            "set tie_word_embeddings to true in its config.json"
        )
    unfit = missing or sorted(str(key[0]) for key in info["mismatched_keys"])
    if unfit:
        what = "are missing" if missing else "do not fit its config.json"
        raise UserError(f"{source}: {len(unfit)} weights {what}, the first is {unfit[0]}")
    return model.eval().requires_grad_(False)


def teacher_config(source: str) -> PretrainedConfig:
    """Its configuration alone. Raises UserError if it cannot be read or is of another family."""
    try:
        config = AutoConfig.from_pretrained(**location(source))
    except _UNREADABLE as error:
        raise UserError(f"{source}: cannot be read as a model: {_line(error)}") from None
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{source}: a model of the family {config.model_type!r}; those that can be converted "
            f"are {', '.join(FAMILIES)}"
        )
    return config


def converted_config(teacher: PretrainedConfig, options: Convert) -> SSEConfig:
    """What `teacher` becomes. Raises UserError naming what SSE-H cannot express."""
    place = options.source
    heads = teacher.num_attention_heads
    width = getattr(teacher, "head_dim", None) or teacher.hidden_size // heads
    rope = teacher.rope_parameters
    refusals = {
        f"rope_type {rope.get('rope_type')!r}: only 'default', unscaled RoPE": (
            rope.get("rope_type", "default") != "default"
        ),
        f"hidden_act {teacher.hidden_act!r}: only 'silu'": teacher.hidden_act != "silu",
        "sliding-window layers: only full attention": (
            set(getattr(teacher, "layer_types", None) or ["full_attention"]) != {"full_attention"}
        ),
    }
    for reason, holds in refusals.items():
        if holds:
            raise UserError(f"{place}: has {reason} can be converted")
    layers = kept_layers(options.attention_layers, teacher.num_hidden_layers)
    if len(layers) < teacher.num_hidden_layers and width not in (16, 32, 64, 128, 256):
        raise UserError(
            f"{place}: heads of width {width}; the kernels of SSE layers serve 16, 32, 64, 128 and "
            "256. Only a conversion that keeps every layer as attention would work"
        )
    attn: dict[str, Any] = {
        "layers": layers,
        "num_heads": heads,
        "num_kv_heads": teacher.num_key_value_heads,
        "head_dim": width,
        "rope_theta": float(rope["rope_theta"]),
        "qkv_bias": teacher.model_type == "qwen2" or getattr(teacher, "attention_bias", False),
        "qk_norm": teacher.model_type == "qwen3",
    }
    same = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    same += ("initializer_range", "max_position_embeddings", "tie_word_embeddings")
    same += ("bos_token_id", "eos_token_id", "pad_token_id")
    try:
        return SSEConfig(
            **{key: getattr(teacher, key) for key in same},
            norm_eps=teacher.rms_norm_eps,
            head_dim=width,
            num_heads=heads,
            linear_attn_type=options.linear_attn_type,
            num_sparse_partition=options.num_sparse_partition,
            num_writer=options.num_writer,
            num_reader=options.num_writer,
            use_short_conv=options.use_short_conv,
            use_output_gate=options.use_output_gate,
            attn=attn if layers else None,
        )
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def kept_layers(wanted: int | list[int] | None, layers: int) -> list[int]:
    """Which of `layers` stay softmax attention: those named, or a count of them evenly spread.

    None keeps one in four. Example: 3 of 12 are 2, 6 and 10, each in the middle of its third, so
    that neither the first layers, which look at neighbours, nor the last carry the recall alone.
    """
    if isinstance(wanted, list):
        for layer in wanted:
            if layer >= layers:
                raise UserError(f"attention_layers: layer {layer} is outside 0..{layers - 1}")
        return sorted(set(wanted))
    count = max(1, round(layers / 4)) if wanted is None else wanted
    if count > layers:
        raise UserError(f"attention_layers = {count}: the model has {layers} layers")
    return [math.floor((i + 0.5) * layers / count) for i in range(count)]


def _renamed(name: str) -> str | None:
    """Our name of a teacher's tensor, None if it has no counterpart."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return _TOP.get(name)
    for pattern, ours in _LAYER.items():
        if match := re.fullmatch(pattern, layer[2]):
            return f"model.layers.{layer[1]}.{match.expand(ours)}"
    return None


def _projections(taken: dict[str, Tensor], norm: Tensor, config: SSEConfig) -> dict[str, Tensor]:
    """q, k, v, o of an SSE layer from those of attention; biases are left behind.

    Qwen3 normalises each head's q and k. SSE does not, so their rows are scaled to the size they
    would have had: norm's weight over the root mean square that inputs of unit variance give.
    """
    assert config.num_v_heads == config.num_heads
    projections = {"o_proj.weight": taken["o_proj.weight"]}
    for name in ("q", "k", "v"):
        weight = taken[f"{name}_proj.weight"].unflatten(0, (-1, config.head_dim))
        if f"{name}_norm.weight" in taken:
            variance = (weight * norm).square().sum(-1).mean(-1)
            gain = taken[f"{name}_norm.weight"] * (variance + config.norm_eps).rsqrt()[:, None]
            weight = weight * gain[..., None]
        shared = config.num_heads // weight.shape[0]
        projections[f"{name}_proj.weight"] = weight.repeat_interleave(shared, 0).flatten(0, 1)
    return projections


@torch.no_grad()
def _start(mixer: SSEMixer) -> None:
    """What attention has no counterpart of, so that it changes little: see the module's text."""
    config = mixer.config
    for low_rank in (mixer.lora_q_proj, mixer.lora_k_proj):
        low_rank[1].weight.zero_()  # pyright: ignore[reportCallIssue]
    for conv in (mixer.q_conv1d_shared, mixer.k_conv1d_shared) if config.use_short_conv else ():
        conv.weight.zero_()
        conv.weight[..., -1] = 1
    mixer.o_norm.weight.fill_(OUTPUT_SCALE)
    if config.linear_attn_type == "gla":
        # logsigmoid(b) / 16 = -ln 2 / half-life
        rate = DECAY_TEMPERATURE * _rates(config.head_dim)
        for low_rank in mixer.gk_proj:
            low_rank[1].weight.zero_()  # pyright: ignore[reportIndexIssue]
            low_rank[1].bias.copy_(-rate.expm1().log().repeat(config.num_heads))  # pyright: ignore[reportIndexIssue]
    else:
        # exp(0) * softplus(b) = ln 2 / half-life
        mixer.a_proj.weight.zero_()
        mixer.A_log.zero_()
        mixer.dt_bias.copy_(_rates(config.value_heads).expm1().log().repeat(2))


def _rates(channels: int) -> Tensor:
    """ln 2 / half-life of each channel."""
    first, last = (math.log2(tokens) for tokens in HALF_LIVES)
    return math.log(2) / 2 ** torch.linspace(first, last, channels)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
