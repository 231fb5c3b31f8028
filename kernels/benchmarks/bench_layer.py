"""Times one SSE layer's decode step on one GPU: the fused launch, and the layer around it.

    python kernels/benchmarks/bench_layer.py [--commit HASH]

One token a sequence at width 2048, H=16, D=128, N=4, K=1, bf16 weights, state fp32 or bf16. The
kernel is from raw projections and router logits to the normed and gated output; the layer adds all
projections, the short convolution, the residual and a norm, without the MLP. The layer is also
timed unfused, as separate modules around `sse_gla_step` or `sse_gdn_step`, in the same run. A
layer's weights and states would stay in the L2 cache if it ran again and again, so four layers take
turns, each with its own (at batch 1 the states of all four fit the cache, the weights do not);
times are medians of a CUDA graph of all four, divided by four.
Writes kernels/benchmarks/results/layer-<device>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from measure import Row, arguments, ceilings, graph_milliseconds, save, shown
from sse_kernels import add_rms_norm
from torch import Tensor, nn

from sse_rl.model import PackedInputs, SlotCache, SSEConfig
from sse_rl.model.mixer import SSEMixer
from sse_rl.model.projections import join_projections

LAYERS = 4
BATCHES = (1, 64, 256)


class Stack:
    """Four layers that decode one token a sequence, without MLPs."""

    def __init__(self, variant: str, batch: int, state_dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = SSEConfig(
            hidden_size=2048, head_dim=128, num_heads=16, num_sparse_partition=4, num_writer=1,
            num_reader=1, linear_attn_type=variant, use_short_conv=True, num_hidden_layers=LAYERS,
        )  # fmt: skip
        with torch.device("cuda"):
            self.norms = [nn.RMSNorm(2048, eps=config.norm_eps).bfloat16() for _ in range(LAYERS)]
            self.mixers = [SSEMixer(config, i) for i in range(LAYERS)]
            cache = SlotCache(
                config, slots=batch + 1, pages=1, dtype=torch.bfloat16, state_dtype=state_dtype,
                device="cuda",
            )  # fmt: skip
            self.x = torch.randn(batch, 2048, dtype=torch.bfloat16)
            slots = torch.randperm(batch) + 1
            self.seqs = PackedInputs(
                torch.arange(batch + 1),
                torch.zeros(batch, dtype=torch.int64),
                1,
                None,
                cache,
                slots,
            )
        for mixer in self.mixers:
            for parameter in mixer.bfloat16().parameters():
                nn.init.normal_(parameter, std=0.02)
            nn.init.ones_(mixer.o_norm.weight)
            join_projections(mixer)
        for state in cache.state:
            state.normal_()

    @torch.no_grad()
    def layers(self) -> Tensor:
        """x after four layers."""
        x, normed = self.x, self.norms[0](self.x)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            mixed, _ = mixer(normed, self.seqs)
            x, normed = add_rms_norm(x, mixed, norm.weight, eps=mixer.config.norm_eps)
        return x

    def kernels(self) -> Callable[[], object]:
        """A call of four mixers' steps between their projections."""
        with torch.no_grad():
            inputs = [mixer._inputs(self.x, self.seqs) for mixer in self.mixers]

        @torch.no_grad()
        def call() -> None:
            for mixer, mine in zip(self.mixers, inputs, strict=True):
                mixer._step(mine, self.seqs, None)

        return call

    def moved(self) -> int:
        """Bytes of the states that a layer's step reads and writes, K = 1."""
        state = self.seqs.cache.state[0]  # pyright: ignore
        return 2 * 2 * len(self.x) * state[0, 0].nbytes


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Within it, layers are separate modules around the recurrences' own steps."""
    with (
        mock.patch("sse_rl.model.mixer.can_fuse", return_value=False),
        mock.patch("sse_kernels.layer_step._launch", return_value=None),
        mock.patch("sse_kernels.elementwise.can_launch", return_value=False),
    ):
        yield


def layer(variant: str, state_dtype: torch.dtype, copy_gb_s: float) -> Iterator[Row]:
    """The fused launch at every batch, and with an fp32 state the layer, fused and unfused."""
    for batch in BATCHES:
        stack = Stack(variant, batch, state_dtype)
        shape = f"batch {batch}, state {str(state_dtype).removeprefix('torch.')}"
        us = graph_milliseconds(stack.kernels()) / LAYERS * 1e3
        yield Row(f"{variant} kernel", shape, "fused", us, "us")
        if batch > 1:
            share = stack.moved() / us / 1e3 / copy_gb_s
            yield Row(f"{variant} kernel", shape, "share of copy bandwidth", share, "1")
        if state_dtype == torch.float32:
            for form, scope in (("fused", contextlib.nullcontext), ("unfused", unfused)):
                with scope():
                    us = graph_milliseconds(stack.layers) / LAYERS * 1e3
                    yield Row(f"{variant} layer", shape, form, us, "us")
        del stack
        torch.cuda.empty_cache()


def main() -> None:
    options = arguments(argparse.ArgumentParser())
    top = ceilings()
    rows: list[Row] = []
    for state_dtype in (torch.float32, torch.bfloat16):
        for variant in ("gla", "gdn"):
            shown(layer(variant, state_dtype, top["copy_gb_s"]), rows)
            save("layer", rows, options, ceilings=top)


if __name__ == "__main__":
    main()
