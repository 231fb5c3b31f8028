"""The products of an SSE layer with its input while decoding: few launches instead of a dozen.

Decoding reads every weight once a step, so all that multiply x should be one matrix. They become
one by lying next to each other in memory: the parameters stay what they are, each a slice of that
matrix, and weights copied into them in place need no further step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from sse_kernels import InputWeights, LayerInputs
from torch import Tensor, nn

if TYPE_CHECKING:
    from sse_rl.model.cache import PackedInputs
    from sse_rl.model.mixer import SSEMixer


@torch.no_grad()
def join_projections(mixer: SSEMixer) -> None:
    """Move the weights that multiply x next to each other; their values and shapes stay."""
    weights = _reading(mixer)
    if len({weight.dtype for weight in weights}) == 1 and _joined(weights) is None:
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, rows in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.data = rows


def can_fuse(x: Tensor) -> bool:
    """Whether `fused_inputs` serves: on CUDA with triton, in any dtype but fp64."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    try:
        from sse_kernels.triton_layer_inputs import layer_inputs_step  # noqa: F401
    except ImportError:
        return False
    return True


@torch.no_grad()
def fused_inputs(mixer: SSEMixer, x: Tensor, seqs: PackedInputs) -> LayerInputs:
    """x [B, d], one token a sequence -> the inputs of the layer's step, windows moved on.

    One product and one launch if `join_projections` has been called, else a product for each
    weight.
    """
    from sse_kernels.triton_layer_inputs import layer_inputs_step

    assert seqs.cache is not None and seqs.slots is not None
    config, weights = mixer.config, _reading(mixer)
    whole = _joined(weights)
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


def _reading(mixer: SSEMixer) -> list[nn.Parameter]:
    """The weights [*, d] that multiply x in the model's dtype, as `layer_inputs_step` has them."""
    layers = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
    layers += [mixer.lora_q_proj[0], mixer.lora_k_proj[0]]
    if mixer.config.linear_attn_type == "gla":
        layers += [stream[0] for stream in mixer.gk_proj]
    else:
        layers += [mixer.a_proj, mixer.b_proj]
    if mixer.config.use_output_gate:
        layers.append(mixer.g_proj[0])
    return [layer.weight for layer in layers]


def _expanding(mixer: SSEMixer) -> InputWeights:
    decays = gate = conv = None
    if mixer.config.linear_attn_type == "gla":
        (_, shared), (_, sparse) = mixer.gk_proj
        decays = shared.weight, shared.bias, sparse.weight, sparse.bias
    if mixer.config.use_output_gate:
        gate = mixer.g_proj[1].weight
    if mixer.config.use_short_conv:
        conv = mixer.q_conv1d_shared.weight, mixer.k_conv1d_shared.weight
    return InputWeights(
        mixer.e_proj.weight,
        mixer.lora_q_proj[1].weight,
        mixer.lora_k_proj[1].weight,
        decays,
        gate,
        conv,
    )


def _joined(weights: list[nn.Parameter]) -> Tensor | None:
    """The one matrix that weights [*, d] are consecutive slices of, if they are."""
    first = weights[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        apart = weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage
        if apart or weight.dtype != first.dtype or not weight.is_contiguous():
            return None
        end += weight.nbytes
    rows = sum(len(weight) for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
