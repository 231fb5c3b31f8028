"""The SSE token mixer: projections and activations around the recurrences of `sse_kernels`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sse_kernels import (
    Routing,
    causal_conv,
    causal_conv_step,
    classify,
    gated_rms_norm,
    gdn_beta,
    gdn_log_decay,
    gla_log_decay,
    route,
    sse_gdn,
    sse_gdn_step,
    sse_gla,
    sse_gla_step,
)
from torch import Tensor, nn

from sse_rl.model.cache import PackedInputs
from sse_rl.model.configuration import SSEConfig

_DECAY_RANK = 16


class Streams(NamedTuple):
    """Queries, keys and values before their activations."""

    q1: Tensor
    """[T, H, Dk], as k1: the shared stream."""
    k1: Tensor
    q2: Tensor
    """[T, H, Dk], as k2: the sparse stream."""
    k2: Tensor
    v: Tensor
    """[T, Hv, Dv]"""


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
        routing = self._route(x, replay)
        q1, k1 = self.q_proj(x), self.k_proj(x)
        q2, k2 = q1 + self.lora_q_proj(x), k1 + self.lora_k_proj(x)
        if self.config.use_short_conv:
            q1 = self._convolve(q1, self.q_conv1d_shared.weight, seqs, 0)
            k1 = self._convolve(k1, self.k_conv1d_shared.weight, seqs, 1)
        widths = (self.config.head_dim,) * 4 + (self.config.value_dim,)
        streams = Streams(
            *(
                stream.unflatten(-1, (-1, width))
                for stream, width in zip((q1, k1, q2, k2, self.v_proj(x)), widths, strict=True)
            )
        )
        recur = self._gla if self.config.linear_attn_type == "gla" else self._gdn
        o = recur(x, streams, routing, seqs)
        gate = None
        if self.config.use_output_gate:
            gate = self.g_proj(x).unflatten(-1, (-1, self.config.value_dim))
        o = gated_rms_norm(o, self.o_norm.weight, gate, eps=self.config.norm_eps)
        return self.o_proj(o.flatten(-2)), routing

    def _route(self, x: Tensor, replay: Tensor | None) -> Routing:
        # fp32 also under autocast: with bf16 logits one token in 500 ties.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.e_proj.weight.float())
        return route(logits, self.config.num_writer, ids=replay)

    def _convolve(self, x: Tensor, weight: Tensor, seqs: PackedInputs, stream: int) -> Tensor:
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

    def _gla(self, x: Tensor, streams: Streams, routing: Routing, seqs: PackedInputs) -> Tensor:
        q1, k1, q2, k2, v = streams
        g1, g2 = (gla_log_decay(low_rank(x).view(q1.shape)) for low_rank in self.gk_proj)
        k1, k2 = (classify(k, self.config.row_topk) for k in (k1, k2))
        inputs = (F.silu(q1), k1, F.silu(q2), k2, F.silu(v), g1, g2, routing)
        return self._recur(partial(sse_gla, *inputs), partial(sse_gla_step, *inputs), seqs)

    def _gdn(self, x: Tensor, streams: Streams, routing: Routing, seqs: PackedInputs) -> Tensor:
        beta = gdn_beta(self.b_proj(x), allow_neg_eigval=self.config.allow_neg_eigval)
        g = gdn_log_decay(self.a_proj(x), self.A_log, self.dt_bias)
        (g1, g2), (beta1, beta2) = g.chunk(2, -1), beta.chunk(2, -1)
        q1, k1, q2, k2, v = (F.silu(stream) for stream in streams)
        inputs = (q1, k1, q2, k2, v, g1, beta1, g2, beta2, routing)
        after = self.config.gate_after_norm
        return self._recur(
            partial(sse_gdn, *inputs, gate_after_norm=after),
            partial(sse_gdn_step, *inputs, gate_after_norm=after),
            seqs,
        )

    def _recur(
        self,
        chunk: Callable[..., tuple[Tensor, Tensor | None]],
        step: Callable[..., Tensor],
        seqs: PackedInputs,
    ) -> Tensor:
        """Outputs [T, Hv, Dv] from the cache's states, if any, which are advanced."""
        if seqs.cache is None:
            return chunk(cu_seqlens=seqs.cu_seqlens)[0]
        state = seqs.cache.state[self.index]
        if seqs.is_step:
            return step(state=state, slots=seqs.slots)
        o, final = chunk(
            cu_seqlens=seqs.cu_seqlens,
            initial_state=state[seqs.slots].float(),
            output_final_state=True,
        )
        assert final is not None
        state[seqs.slots] = final.to(state.dtype)
        return o


def _low_rank(d: int, rank: int, width: int, *, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, width, bias=bias))


def _depthwise(channels: int, size: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, size, groups=channels, bias=False)
