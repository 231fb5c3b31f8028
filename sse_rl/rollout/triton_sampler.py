"""`sampler.sample` in one launch, for rows whose parameters and counters stand on the GPU.

One program a row. The random number, the cuts and the draw need no sort and no copy of the row:
what top-k and top-p keep is found by bisection over the values that an fp32 number can take.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sse_rl.rollout.arrival import send
from sse_rl.rollout.lanes import Lanes
from sse_rl.rollout.sampler import GREEDY_BELOW

_BLOCK = 4096


class SamplerTables:
    """What a step needs to know of each of S slots, on the device: [S] tensors.

    token, position: the last sampled token and where it stands, not yet fed; count: tokens sampled;
    key: `sampler.stream_key` as int64; and the sampling parameters. Slot 0 is scratch and stays 0.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        whole = torch.zeros(5, slots, dtype=torch.int64, device=device)
        parts = torch.zeros(3, slots, dtype=torch.float32, device=device)
        self.token, self.position, self.count, self.key, self.top_k = whole
        self.temperature, self.top_p, self.min_p = parts
        self._whole, self._parts = whole, parts

    def open(self, index: Tensor, lanes: Lanes, slots: np.ndarray) -> None:
        """Samples begin in `slots`, which `index` holds on the device."""
        none = np.zeros_like(slots)
        knobs = lanes.knobs(slots)
        key = lanes.key[slots].view(np.int64)
        whole = np.stack([none, lanes.prompt[slots] - 1, none, key, knobs.top_k])
        parts = np.stack([knobs.temperature, knobs.top_p, knobs.min_p])
        self._whole.index_copy_(1, index, send(whole, index.device))
        self._parts.index_copy_(1, index, send(parts, index.device))


def triton_sample(
    logits: Tensor, slots: Tensor, tables: SamplerTables, *, block: int = _BLOCK
) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 and log-probs [R] fp32 of logits [R, V], row r for slot slots[r] [R].

    The slot's token becomes the one drawn, its position and count grow by one. Which tokens may be
    drawn and what decides is `sampler.sample`'s definition, with `sampler.uniforms(key, count)`;
    sums are rounded in another order, so that a draw within rounding of a boundary may fall on its
    other side.
    """
    rows, width = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(block, max(triton.next_power_of_2(width), 16))
    blocks = triton.cdiv(width, block)
    sample_kernel[(rows,)](
        logits.contiguous(), slots, tables.temperature, tables.top_k, tables.top_p, tables.min_p,
        tables.key, tables.token, tables.position, tables.count, tokens, logprobs,
        V=width, NB=blocks, NBP=max(triton.next_power_of_2(blocks), 2), BLOCK=block,
        GREEDY=GREEDY_BELOW, num_warps=8 if block >= 4096 else 4,
    )  # fmt: skip
    return tokens, logprobs


@triton.jit
def sample_kernel(
    logits, slots, temperature, top_k, top_p, min_p, key, last, position, count, tokens, logprobs,
    V: tl.constexpr, NB: tl.constexpr, NBP: tl.constexpr, BLOCK: tl.constexpr,
    GREEDY: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    row, slot = logits + i_r * V, tl.load(slots + i_r)
    heat = tl.load(temperature + slot)
    greedy = heat < GREEDY
    heat = tl.where(greedy, 1.0, heat)

    largest, best = float("-inf"), V
    for i in range(NB):
        n, x = _block(row, i, heat, V, BLOCK)
        top = tl.max(x, axis=0)
        first = tl.min(tl.where(x == top, n, V), axis=0)
        best = tl.where(top > largest, first, best)
        largest = tl.maximum(largest, top)
    whole = 0.0
    for i in range(NB):
        n, x = _block(row, i, heat, V, BLOCK)
        whole += tl.sum(tl.exp(x - largest), axis=0)

    floor, spared = float("-inf"), 0  # the smallest value kept, and how many of its ties are cut
    k, p, m = tl.load(top_k + slot), tl.load(top_p + slot), tl.load(min_p + slot)
    if m > 0:
        floor = largest + tl.log(m)
    if (k > 0) & (k < V):
        low, high = _order(tl.maximum(floor, -3.4e38)), _order(largest)
        low, high = _bisect(row, heat, largest, low, high, k.to(tl.float32), V, NB, BLOCK, True)
        floor = _value(low)
    if p < 1:
        low = _order(tl.maximum(floor, -3.4e38))
        kept = _mass(row, heat, largest, low, V, NB, BLOCK, False)
        # Mass that must lie at or above the smallest value kept, short of what is cut below it.
        enough = kept - (1 - p) * kept
        low, high = _bisect(row, heat, largest, low, _order(largest), enough, V, NB, BLOCK, False)
        floor = _value(low)
        above = _mass(row, heat, largest, low + 1, V, NB, BLOCK, False)
        ties = _mass(row, heat, largest, low, V, NB, BLOCK, True)
        ties -= _mass(row, heat, largest, low + 1, V, NB, BLOCK, True)
        need = tl.ceil((enough - above) / tl.exp(floor - largest))
        spared = (ties - tl.minimum(tl.maximum(need, 1.0), ties)).to(tl.int32)

    i_n = tl.arange(0, NBP)
    sums, seen = tl.zeros([NBP], tl.float32), tl.zeros([NBP], tl.int32)
    sampled, passed = tl.load(count + slot), 0
    for i in range(NB):
        n, x = _block(row, i, heat, V, BLOCK)
        keep, ties = _kept(x, floor, spared, passed)
        sums = tl.where(i_n == i, tl.sum(tl.where(keep, tl.exp(x - largest), 0.0), axis=0), sums)
        seen = tl.where(i_n == i, passed, seen)
        passed += ties
    reached = tl.cumsum(sums, axis=0)
    target = _uniform(tl.load(key + slot), sampled) * tl.max(reached, axis=0)
    # The last block that holds anything, if rounding leaves none beyond the target.
    end = tl.max(tl.where(sums > 0, i_n, 0), axis=0)
    i = tl.min(tl.where((reached > target) & (sums > 0), i_n, end), axis=0)
    before = tl.max(tl.where(i_n < i, reached, 0.0), axis=0)
    n, x = _block(row, i, heat, V, BLOCK)
    keep, ties = _kept(x, floor, spared, tl.sum(tl.where(i_n == i, seen, 0), axis=0))
    probs = tl.where(keep, tl.exp(x - largest), 0.0)
    beyond = (before + tl.cumsum(probs, axis=0) > target) & (probs > 0)
    token = tl.min(tl.where(beyond, n, V), axis=0)
    token = tl.where(token == V, tl.max(tl.where(probs > 0, n, 0), axis=0), token)
    token = tl.where(greedy, tl.minimum(best, V - 1), token)
    tl.store(tokens + i_r, token.to(tl.int64))
    tl.store(last + slot, token.to(tl.int64), mask=slot > 0)
    tl.store(count + slot, sampled + 1, mask=slot > 0)
    tl.store(position + slot, tl.load(position + slot) + 1, mask=slot > 0)
    chosen = tl.load(row + token).to(tl.float32) / heat
    tl.store(logprobs + i_r, chosen - largest - tl.log(whole))


@triton.jit
def _block(row, i, heat, V: tl.constexpr, BLOCK: tl.constexpr):
    """Column numbers and scaled logits of block i."""
    n = i * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(row + n, mask=n < V, other=float("-inf")).to(tl.float32)
    return n, x / heat


@triton.jit
def _kept(x, floor, spared, passed):
    """Which of a block's values are kept: of those equal to the floor, not the first `spared`, of
    which `passed` lie in earlier blocks. Also how many equal it."""
    keep, ties = x >= floor, 0
    if spared > 0:
        tied = (x == floor).to(tl.int32)
        keep = keep & ((tied == 0) | (passed + tl.cumsum(tied, axis=0) > spared))
        ties = tl.sum(tied, axis=0)
    return keep, ties


@triton.jit
def _bisect(
    row, heat, largest, low, high, least,
    V: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The largest number in low..high at and above which there is at least `least`, else low."""
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = _mass(row, heat, largest, middle, V, NB, BLOCK, COUNT) >= least
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low, high


@triton.jit
def _mass(
    row, heat, largest, number, V: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Probability, or count, of the values at and above the one with this number."""
    value, mass = _value(number), 0.0
    for i in range(NB):
        n, x = _block(row, i, heat, V, BLOCK)
        weight = (n < V).to(tl.float32) if COUNT else tl.exp(x - largest)
        mass += tl.sum(tl.where(x >= value, weight, 0.0), axis=0)
    return mass


@triton.jit
def _order(x):
    """fp32 numbers numbered in their order, int64; both zeros are 0."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -(bits + 2147483648), bits)


@triton.jit
def _value(number):
    """The inverse of `_order`."""
    bits = tl.where(number < 0, -number - 2147483648, number)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(key, count):
    """`sampler.uniforms`; int64 wraps as uint64 does, the shifts are made logical by masks."""
    x = key + (count + 1) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return (((x >> 41) & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07
