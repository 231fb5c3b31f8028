"""The fused decode step on a GPU: against fp64 on the same rounded inputs, bits, graphs."""

from __future__ import annotations

import pytest
import sse_kernels
import torch
from torch import Tensor

from sse_rl.model import PackedInputs, SlotCache, SSEConfig
from sse_rl.model.mixer import SSEMixer
from sse_rl.model.projections import join_projections

pytestmark = pytest.mark.gpu

SHAPES = {
    "gla": {"linear_attn_type": "gla"},
    "gla-wide": {"linear_attn_type": "gla", "num_v_heads": 8, "num_sparse_partition": 8,
                 "num_writer": 3, "num_reader": 3, "row_topk": 32},
    "gla-256": {"linear_attn_type": "gla", "head_dim": 256, "num_heads": 2},
    "gdn": {"linear_attn_type": "gdn"},
    "gdn-wide": {"linear_attn_type": "gdn", "num_v_heads": 8, "expand_v": 0.5, "num_writer": 2,
                 "num_reader": 2, "gate_after_norm": True, "allow_neg_eigval": True,
                 "use_output_gate": False, "use_short_conv": False},
}  # fmt: skip


def build(shape: str, dtype: torch.dtype, batch: int = 5) -> tuple[SSEMixer, Tensor, PackedInputs]:
    torch.manual_seed(0)
    common = {"hidden_size": 512, "head_dim": 128, "num_heads": 4, "use_short_conv": True,
              "num_writer": 1, "num_reader": 1, "num_hidden_layers": 1}  # fmt: skip
    config = SSEConfig(**common | SHAPES[shape])
    mixer = SSEMixer(config, 0).cuda()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else 0.05)
        parameter.data = parameter.to(dtype)
    cache = SlotCache(config, slots=9, pages=1, dtype=dtype, device="cuda")
    for tensor in cache.slotted():
        tensor.normal_()
    slots = (torch.randperm(8)[:batch] + 1).cuda()
    x = torch.randn(batch, 512, device="cuda", dtype=dtype)
    steps = torch.arange(batch + 1, device="cuda")
    return mixer, x, PackedInputs(steps, steps[:-1] * 0, 1, None, cache, slots)


def twin(mixer: SSEMixer, seqs: PackedInputs) -> tuple[SSEMixer, PackedInputs]:
    """The same numbers in fp64, which the torch forms compute."""
    exact = SSEMixer(mixer.config, 0).cuda().double()
    exact.load_state_dict({name: x.double() for name, x in mixer.state_dict().items()})
    assert seqs.cache is not None
    double = torch.float64
    cache = SlotCache(
        mixer.config, slots=9, pages=1, dtype=double, state_dtype=double, device="cuda"
    )
    for mine, theirs in zip(cache.slotted(), seqs.cache.slotted(), strict=True):
        mine.copy_(theirs)
    where = PackedInputs(seqs.cu_seqlens, seqs.positions, 1, None, cache, seqs.slots)
    return exact, where


def error(x: Tensor, exact: Tensor) -> float:
    found = float((x.double() - exact).norm() / exact.norm())
    print(f"error {found:.1e}")
    return found


# Relative Frobenius error against fp64 on the same rounded inputs; measured 4.9e-3 and 8.9e-7.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 5e-6}
CASES = [(shape, torch.bfloat16) for shape in SHAPES]
CASES += [(shape, torch.float32) for shape in ("gla", "gdn-wide")]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@torch.no_grad()
def test_the_layer_is_its_definition(shape, dtype, joined):
    mixer, x, seqs = build(shape, dtype)
    exact, apart = twin(mixer, seqs)
    if joined:
        join_projections(mixer)
    assert seqs.cache is not None and apart.cache is not None
    for _ in range(3):
        y, routing = mixer(x, seqs)
        right, chosen = exact(x.double(), apart)
        assert torch.equal(routing.ids.long(), chosen.ids)
        torch.testing.assert_close(routing.probs, chosen.probs, rtol=1e-4, atol=1e-5)
        assert error(y, right) < TOLERANCE[dtype]
    for mine, theirs in zip(seqs.cache.slotted(), apart.cache.slotted(), strict=True):
        assert error(mine, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_captured_layer_follows_its_weights_and_repeats_its_bits(shape):
    mixer, x, seqs = build(shape, torch.bfloat16)
    join_projections(mixer)
    assert seqs.cache is not None
    before = [tensor.clone() for tensor in seqs.cache.slotted()]

    def reset() -> None:
        for tensor, start in zip(seqs.cache.slotted(), before, strict=True):  # pyright: ignore
            tensor.copy_(start)

    mixer(x, seqs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, routing = mixer(x, seqs)
    for factor in (1.0, 0.5):
        mixer.v_proj.weight.mul_(factor)
        mixer.e_proj.weight.mul_(factor)
        reset()
        right, chosen = mixer(x, seqs)
        after = [tensor.clone() for tensor in seqs.cache.slotted()]
        reset()
        graph.replay()
        assert torch.equal(y, right) and torch.equal(routing.probs, chosen.probs)
        assert all(map(torch.equal, seqs.cache.slotted(), after))


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_a_partition_that_does_not_exist_is_skipped(variant):
    torch.manual_seed(0)
    batch, h, d, n = 3, 2, 64, 5  # a tile of the router holds 8 partitions
    normal = lambda *shape: torch.randn(batch, *shape, device="cuda")
    decays = [normal(h, d), normal(h, d)] if variant == "gla" else [normal(2 * h), normal(2 * h)]
    arguments = [*(normal(h, d) for _ in range(5)), *decays, normal(n)]
    named = {"norm_weight": normal(d)[0], "eps": 1e-6}
    if variant == "gdn":
        named |= {"A_log": normal(2 * h)[0], "dt_bias": normal(2 * h)[0]}
    before = torch.randn(4, 1 + n, h, d, d, device="cuda")

    def step(ids):
        named["ids"], named["k"] = torch.tensor(ids, device="cuda"), len(ids[0])
        state, slots = before.clone(), torch.tensor([3, 1, 2], device="cuda")
        layer_step = getattr(sse_kernels, f"sse_{variant}_layer_step")
        return *layer_step(*arguments, **named, state=state, slots=slots), state

    o, routing, state = step([[7, 2], [-1, 300], [3, 3]])
    assert routing.ids.tolist() == [[2, 0], [0, 0], [3, 0]]
    assert routing.weights.bool().tolist() == [[True, False], [False, False], [True, False]]
    touched = torch.zeros(4, 1 + n, dtype=torch.bool, device="cuda")
    touched[3, [0, 3]] = touched[1, 0] = touched[2, [0, 4]] = True
    assert torch.equal((state != before).flatten(2).any(-1), touched)
    right, _, alone = step([[2], [0], [3]])
    for row, slot in ((0, 3), (2, 2)):
        torch.testing.assert_close(o[row], right[row], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[slot], alone[slot], rtol=1e-5, atol=1e-5)
    assert o.isfinite().all()
