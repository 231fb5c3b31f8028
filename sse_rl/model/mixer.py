"""The SSE token mixer: projections and activations around the recurrences of `sse_kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sse_kernels import (
    LayerInputs,
    Routing,
    causal_conv,
    causal_conv_step,
    route,
    sse_gdn_layer,
    sse_gdn_layer_step,
    sse_gla_layer,
    sse_gla_layer_step,
    take_rows,
)
from torch import Tensor, nn

from sse_rl.model.cache import PackedInputs
from sse_rl.model.configuration import SSEConfig
from sse_rl.model.fork import Fork
from sse_rl.model.joined import product
from sse_rl.model.projections import can_fuse, fused_inputs, reading_layers

_DECAY_RANK = 16


class SSEMixer(nn.Module):
    """One shared and N sparse states a value head, of which each token reads and writes K.

    Args:
        index: which of the model's SSE layers this is: its place in the cache and in a replay.
    """

    def __init__(self, config: SSEConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.index = index
        d, rank = config.hidden_size, config.value_dim
        keys = config.num_heads * config.head_dim
        values = config.value_heads * config.value_dim
        self.q_proj = nn.Linear(d, keys, bias=False)
        self.k_proj = nn.Linear(d, keys, bias=False)
        self.v_proj = nn.Linear(d, values, bias=False)
        self.e_proj = nn.Linear(d, config.num_sparse_partition, bias=False)
        self.lora_q_proj = _low_rank(d, rank, keys)
        self.lora_k_proj = _low_rank(d, rank, keys)
        if config.linear_attn_type == "gla":
            self.gk_proj = nn.Sequential(
                _low_rank(d, _DECAY_RANK, keys, bias=True),
                _low_rank(d, _DECAY_RANK, keys, bias=True),
            )
        else:
            streams = 2 * config.value_heads
            self.a_proj = nn.Linear(d, streams, bias=False)
            self.b_proj = nn.Linear(d, streams, bias=False)
            self.A_log = nn.Parameter(torch.empty(streams))
            self.dt_bias = nn.Parameter(torch.empty(streams))
        if config.use_short_conv:
            self.q_conv1d_shared = _depthwise(keys, config.conv_size)
            self.k_conv1d_shared = _depthwise(keys, config.conv_size)
        if config.use_output_gate:
            self.g_proj = _low_rank(d, rank, values)
        self.o_norm = nn.RMSNorm(config.value_dim, eps=config.norm_eps)
        self.o_proj = nn.Linear(values, d, bias=False)

    def forward(
        self, x: Tensor, seqs: PackedInputs, replay: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """x [T, d] -> output [T, d] and the routing; the cache, if any, is advanced in place.

        `replay` [T, K] fixes the partitions; their weights still come from the live router.
        """
        inputs = self._inputs(x, seqs)
        run = self._step if seqs.is_step else self._sequences
        o, routing = run(inputs, seqs, replay)
        return self.o_proj(o.flatten(-2)), routing

    def _inputs(self, x: Tensor, seqs: PackedInputs) -> LayerInputs:
        if seqs.is_step and can_fuse(self, x):
            return fused_inputs(self, x, seqs)
        q1, k1, v, low_q, low_k, first, second, *low_gate = self._read(x)
        q2, k2 = q1 + self.lora_q_proj[1](low_q), k1 + self.lora_k_proj[1](low_k)
        if self.config.use_short_conv:
            q1 = self._convolve(q1, self.q_conv1d_shared.weight, seqs, 0)
            k1 = self._convolve(k1, self.k_conv1d_shared.weight, seqs, 1)
        q1, k1, q2, k2 = (y.unflatten(-1, (self.config.num_heads, -1)) for y in (q1, k1, q2, k2))
        if self.config.linear_attn_type == "gla":
            widen = self.get_submodule("gk_proj.0.1"), self.get_submodule("gk_proj.1.1")
            first, second = widen[0](first).view(q1.shape), widen[1](second).view(q1.shape)
        values = (self.config.value_heads, self.config.value_dim)
        gate = self.g_proj[1](low_gate[0]).unflatten(-1, values) if low_gate else None
        # fp32 also under autocast: with bf16 logits one token in 500 ties.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.e_proj.weight.float())
        return LayerInputs(q1, k1, q2, k2, v.unflatten(-1, values), (first, second), gate, logits)

    def _read(self, x: Tensor) -> Sequence[Tensor]:
        """What multiplies x, in the order of `reading_layers`."""
        names = reading_layers(self)
        layers = [self.get_submodule(name) for name in names]
        whole = product(x, layers)
        if whole is None:  # v last: gradients are added in the opposite order
            q1, k1, *low, v = (layer(x) for layer in (*layers[:2], *layers[3:], layers[2]))
            return q1, k1, v, *low
        widths = [len(self.get_parameter(f"{name}.weight")) for name in names]
        wide, low = whole.split([sum(widths[:3]), sum(widths[3:])], -1)
        # A copy of the narrow ones: the backward pass keeps them, and would keep the whole.
        return *wide.split(widths[:3], -1), *low.contiguous().split(widths[3:], -1)

    def _convolve(self, x: Tensor, weight: Tensor, seqs: PackedInputs, stream: int) -> Tensor:
        if seqs.fork is not None:
            behind = seqs.fork.window
            rows = take_rows(x, behind.rows)
            y, _ = causal_conv(rows, weight, cu_seqlens=behind.inputs.cu_seqlens)
            return take_rows(y, behind.places)
        if seqs.cache is None:
            return causal_conv(x, weight, cu_seqlens=seqs.cu_seqlens)[0]
        assert seqs.slots is not None
        window = seqs.cache.conv[self.index][stream]
        if seqs.is_step:
            return causal_conv_step(x, weight, state=window, slots=seqs.slots)
        y, final = causal_conv(
            x, weight, cu_seqlens=seqs.cu_seqlens, initial=window[seqs.slots], output_final=True
        )
        assert final is not None
        window[seqs.slots] = final.to(window.dtype)
        return y

    def _step(
        self, inputs: LayerInputs, seqs: PackedInputs, replay: Tensor | None
    ) -> tuple[Tensor, Routing]:
        """One token a sequence, in the cache's states: outputs [T, Hv, Dv] behind norm and gate."""
        streams, decays = inputs[:5], inputs.decays
        config, cache = self.config, seqs.cache
        assert cache is not None and seqs.slots is not None
        common = {
            "k": config.num_writer,
            "ids": replay,
            "norm_weight": self.o_norm.weight,
            "gate": inputs.gate,
            "eps": config.norm_eps,
            "state": cache.state[self.index],
            "slots": seqs.slots,
        }
        if config.linear_attn_type == "gla":
            return sse_gla_layer_step(
                *streams, *decays, inputs.logits, row_topk=config.row_topk, **common
            )
        return sse_gdn_layer_step(
            *streams,
            *decays,
            inputs.logits,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            allow_neg_eigval=config.allow_neg_eigval,
            gate_after_norm=config.gate_after_norm,
            **common,
        )

    def _sequences(
        self, inputs: LayerInputs, seqs: PackedInputs, replay: Tensor | None
    ) -> tuple[Tensor, Routing]:
        """Whole pieces of sequences; the cache's states, if any, are continued and advanced."""
        routing = route(inputs.logits, self.config.num_writer, ids=replay)
        if seqs.fork is not None:
            return self._forked(inputs, routing, seqs.cu_seqlens, seqs.fork), routing
        if seqs.cache is None:
            return self._recur(inputs, routing, seqs.cu_seqlens)[0], routing
        state = seqs.cache.state[self.index]
        y, final = self._recur(
            inputs, routing, seqs.cu_seqlens, state[seqs.slots].float(), output_final=True
        )
        assert final is not None
        state[seqs.slots] = final.to(state.dtype)
        return y, routing

    def _forked(
        self, inputs: LayerInputs, routing: Routing, cu_seqlens: Tensor, fork: Fork
    ) -> Tensor:
        """Prompts, then their answers from the prompts' final states."""
        bounds = cu_seqlens[: fork.prompts + 1], cu_seqlens[fork.prompts :] - fork.prompt_tokens
        first, others = _split((inputs, routing), fork.prompt_tokens)
        y, final = self._recur(first[0], first[1], bounds[0], output_final=True)
        if not len(fork.parent.index):
            return y
        assert final is not None
        more, _ = self._recur(others[0], others[1], bounds[1], take_rows(final, fork.parent))
        return torch.cat([y, more])

    def _recur(
        self,
        inputs: LayerInputs,
        routing: Routing,
        cu_seqlens: Tensor,
        initial: Tensor | None = None,
        *,
        output_final: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs [T, Hv, Dv] behind norm and gate, and the final states on request."""
        streams, decays, config = inputs[:5], inputs.decays, self.config
        common = {
            "norm_weight": self.o_norm.weight,
            "gate": inputs.gate,
            "eps": config.norm_eps,
            "cu_seqlens": cu_seqlens,
            "initial_state": initial,
            "output_final_state": output_final,
        }
        if config.linear_attn_type == "gla":
            return sse_gla_layer(*streams, *decays, routing, row_topk=config.row_topk, **common)
        return sse_gdn_layer(
            *streams,
            *decays,
            routing,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            allow_neg_eigval=config.allow_neg_eigval,
            gate_after_norm=config.gate_after_norm,
            **common,
        )


def _split(x: Any, n: int) -> tuple[Any, Any]:
    """The first n rows and the others, of the tensors in nested tuples."""
    if x is None:
        return None, None
    if isinstance(x, tuple):
        make = getattr(x, "_make", tuple)
        first, others = zip(*(_split(y, n) for y in x), strict=True)
        return make(first), make(others)
    first, others = x.split([n, len(x) - n])
    # Kernels are compiled for addresses of 16 bytes, and anew for others.
    aligned = others.storage_offset() * others.element_size() % 16 == 0
    return first, others if aligned else others.clone()


def _low_rank(d: int, rank: int, width: int, *, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, width, bias=bias))


def _depthwise(channels: int, size: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, size, groups=channels, bias=False)
