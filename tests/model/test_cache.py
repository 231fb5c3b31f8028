"""Prefill by chunks and decoding by steps continue exactly what a single pass computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sse_rl.model import PackedInputs, SlotCache, SSEForCausalLM, packed_inputs

PAGE = 16
TOLERANCE = 1e-4  # measured: 2.5e-5 (gdn-wide), below 1e-5 in the other variants


class Rows:
    """Sequences fed piece by piece; row r owns slot 1 + r and scattered pages."""

    def __init__(self, model: SSEForCausalLM, rows: int, capacity: int = 192) -> None:
        self.model = model
        self.per_row = capacity // PAGE
        pages = 1 + rows * self.per_row
        self.cache = SlotCache(
            model.config, slots=1 + rows, pages=pages, page_size=PAGE, dtype=torch.float32,
            device="cpu",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        self.table = 1 + torch.randperm(rows * self.per_row, generator=generator).view(rows, -1)
        self.lengths = torch.zeros(rows, dtype=torch.int64)

    @torch.no_grad()
    def feed(
        self, pieces: dict[int, Tensor], *, scratch: int = 0, extra_pages: int = 0
    ) -> dict[int, Tensor]:
        """Hidden states of each piece; `scratch` padding rows and table columns change nothing."""
        rows = torch.tensor(list(pieces))
        lengths = torch.tensor([len(p) for p in pieces.values()])
        context = self.lengths[rows]
        seqs: PackedInputs = packed_inputs(lengths.tolist() + [1] * scratch)
        zeros = torch.zeros(scratch, dtype=torch.int64)
        context_all = torch.cat((context, zeros))
        all_lengths = torch.cat((lengths, zeros + 1))
        seqs.positions = seqs.positions + torch.repeat_interleave(context_all, all_lengths)
        seqs.cache = self.cache
        seqs.slots = torch.cat((1 + rows, zeros))
        table = torch.cat((self.table[rows], zeros[:, None].expand(-1, self.per_row)))
        seqs.block_table = torch.nn.functional.pad(table, (0, extra_pages))
        seqs.context_lens = context_all
        seqs.max_context = int((context + lengths).max()) + extra_pages * PAGE
        out = self.model.packed(torch.cat((*pieces.values(), zeros)), seqs)
        self.lengths[rows] += lengths
        split = out.hidden.split([*lengths.tolist(), *[1] * scratch])
        return dict(zip(pieces, split, strict=False))


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(seed))


def whole(model: SSEForCausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.packed(tokens, packed_inputs([len(tokens)])).hidden


@pytest.mark.parametrize("cuts", [(64, 64), (1,), (65, 1, 60), (3, 97)])
def test_chunked_prefill_and_steps_equal_the_full_forward(model, cuts):
    tokens = text(sum(cuts) + 5)
    rows = Rows(model, 1)
    fed = [rows.feed({0: piece})[0] for piece in tokens.split([*cuts, *[1] * 5])]
    assert (torch.cat(fed) - whole(model, tokens)).abs().max() < TOLERANCE


def test_a_block_table_without_room_is_refused(model):
    rows = Rows(model, 1, capacity=32)
    with pytest.raises(ValueError, match="block_table: room for 32 tokens, max_context 40"):
        rows.feed({0: text(40)})


def test_sequences_of_different_ages_share_a_call(model):
    first, second = text(100, 1), text(40, 2)
    rows = Rows(model, 2)
    fed = {0: [rows.feed({0: first[:64]})[0]], 1: []}
    for a, b in ((first[64:90], second[:38]), (first[90:91], second[38:39])):
        for row, hidden in rows.feed({0: a, 1: b}).items():
            fed[row].append(hidden)
    assert (torch.cat(fed[0]) - whole(model, first[:91])).abs().max() < TOLERANCE
    assert (torch.cat(fed[1]) - whole(model, second[:39])).abs().max() < TOLERANCE


def test_a_fork_continues_like_its_parent(model):
    tokens = text(40)
    rows = Rows(model, 3)
    rows.feed({0: tokens[:33]})
    rows.cache.fork([1, 1], [2, 3])
    for row in (1, 2):
        rows.lengths[row] = 33
        rows.cache.copy_pages(rows.table[0, :3], rows.table[row, :3])
    fed = rows.feed({0: tokens[33:34], 2: tokens[33:34], 1: tokens[33:34]}, scratch=13)
    assert torch.equal(fed[0], fed[1]) and torch.equal(fed[0], fed[2])
    assert (fed[0] - whole(model, tokens[:34])[-1]).abs().max() < TOLERANCE


def test_a_reset_slot_starts_anew(model):
    rows = Rows(model, 1)
    rows.feed({0: text(20)})
    rows.cache.reset([1])
    rows.lengths[0] = 0
    hidden = rows.feed({0: text(10, 5)})[0]
    assert (hidden - whole(model, text(10, 5))).abs().max() < TOLERANCE


def test_a_step_has_the_same_bits_in_any_company_and_with_any_block_table(model):
    def decode(company: int, scratch: int, extra_pages: int, at: int) -> Tensor:
        rows = Rows(model, company + 1)
        others = [r for r in range(company + 1) if r != at]
        prompts = {r: text(4 + 7 * (r % 5), 10 + r) for r in others}
        rows.feed({at: text(50)}, scratch=0)
        for row, prompt in prompts.items():
            rows.feed({row: prompt})
        hidden = []
        for t in range(6):
            pieces = {r: text(1, 100 * r + t) for r in others}
            pieces[at] = text(1, 999 + t)
            pieces = {r: pieces[r] for r in range(company + 1)}
            out = rows.feed(pieces, scratch=scratch, extra_pages=extra_pages if t % 2 else 0)
            hidden.append(out[at])
        return torch.cat(hidden)

    alone = decode(0, 15, 0, at=0)
    for company, scratch, extra_pages, at in ((0, 23, 3, 0), (7, 8, 0, 4), (22, 1, 5, 22)):
        assert torch.equal(alone, decode(company, scratch, extra_pages, at))


def test_a_prefill_has_the_same_bits_in_any_company(model):
    rows = Rows(model, 3)
    alone = rows.feed({0: text(64)})[0]
    other = Rows(model, 3)
    fed = other.feed({1: text(64, 7), 0: text(64), 2: text(30, 8)}, extra_pages=2)
    assert torch.equal(alone, fed[0])
