"""The products of a layer with its input while decoding: few launches instead of a dozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from sse_kernels import InputWeights, LayerInputs
from torch import Tensor, nn

from sse_rl.model.attention import SoftmaxAttention
from sse_rl.model.joined import join, joined

if TYPE_CHECKING:
    from sse_rl.model.cache import PackedInputs
    from sse_rl.model.mixer import SSEMixer
    from sse_rl.model.modeling import SSEBlock


def join_block(block: SSEBlock) -> None:
    """Move the weights that multiply the same input next to each other, see `joined`."""
    mixer, mlp = block.attn, block.mlp
    if isinstance(mixer, SoftmaxAttention):
        join([layer.weight for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj)])
    else:
        join_projections(mixer)
    join([mlp.gate_proj.weight, mlp.up_proj.weight])


def join_projections(mixer: SSEMixer) -> None:
    """`join_block` of a mixer alone."""
    join(_reading(mixer))


def can_fuse(mixer: SSEMixer, x: Tensor) -> bool:
    """Whether `fused_inputs` serves: on CUDA with triton, not for fp64, and for plain layers only
    (an adapter's or quantised ones have their own forward)."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    try:
        from sse_kernels.triton_layer_inputs import layer_inputs_step  # noqa: F401
    except ImportError:
        return False
    layers = [*reading_layers(mixer), "lora_q_proj.1", "lora_k_proj.1", "e_proj"]
    return all(type(mixer.get_submodule(name)) is nn.Linear for name in layers)


@torch.no_grad()
def fused_inputs(mixer: SSEMixer, x: Tensor, seqs: PackedInputs) -> LayerInputs:
    """x [B, d], one token a sequence -> the inputs of the layer's step, windows moved on.

    One product and one launch if `join_projections` has been called, else a product for each
    weight.
    """
    from sse_kernels.triton_layer_inputs import layer_inputs_step

    assert seqs.cache is not None and seqs.slots is not None
    config, weights = mixer.config, _reading(mixer)
    whole = joined(weights)
    if whole is not None:
        projected = F.linear(x, whole)
    else:
        projected = torch.cat([F.linear(x, weight) for weight in weights], -1)
    return layer_inputs_step(
        x,
        projected,
        _expanding(mixer),
        heads=(config.num_heads, config.value_heads),
        windows=seqs.cache.conv[mixer.index] if config.use_short_conv else None,
        slots=seqs.slots,
    )


def reading_layers(mixer: SSEMixer) -> list[str]:
    """Layers that multiply x in the model's dtype, in the order of `layer_inputs_step`."""
    names = ["q_proj", "k_proj", "v_proj", "lora_q_proj.0", "lora_k_proj.0"]
    gla = mixer.config.linear_attn_type == "gla"
    names += ["gk_proj.0.0", "gk_proj.1.0"] if gla else ["a_proj", "b_proj"]
    return [*names, "g_proj.0"] if mixer.config.use_output_gate else names


def _reading(mixer: SSEMixer) -> list[nn.Parameter]:
    return [mixer.get_parameter(f"{name}.weight") for name in reading_layers(mixer)]


def _expanding(mixer: SSEMixer) -> InputWeights:
    config, get = mixer.config, mixer.get_parameter
    decays = gate = conv = None
    if config.linear_attn_type == "gla":
        shared, sparse = "gk_proj.0.1", "gk_proj.1.1"
        decays = (
            get(f"{shared}.weight"),
            get(f"{shared}.bias"),
            get(f"{sparse}.weight"),
            get(f"{sparse}.bias"),
        )
    if config.use_output_gate:
        gate = get("g_proj.1.weight")
    if config.use_short_conv:
        conv = get("q_conv1d_shared.weight"), get("k_conv1d_shared.weight")
    lora = get("lora_q_proj.1.weight"), get("lora_k_proj.1.weight")
    return InputWeights(get("e_proj.weight"), *lora, decays, gate, conv)
