"""Packed = alone: nothing leaks across the boundaries of a packed row or of a padded batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sse_rl.model import SlotCache, SSEForCausalLM, packed_inputs

ORDERS = ((1, 63, 64, 65, 130), (130, 1, 65, 64, 63), (64, 130, 63, 1, 65))
TOLERANCE = 1e-4  # measured: outputs 1.2e-5, states 1.0e-5, gradients 3.9e-6 of the largest


def sequences(order: tuple[int, ...]) -> list[Tensor]:
    return [torch.randint(1, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in order]


def with_cache(model: SSEForCausalLM, lengths: list[int]):
    """`packed_inputs` of whole sequences on top of a fresh cache, one slot and 3 pages each."""
    count, pages = len(lengths), 3
    seqs = packed_inputs(lengths)
    seqs.cache = SlotCache(
        model.config, slots=1 + count, pages=1 + pages * count, dtype=model.dtype, device="cpu"
    )
    seqs.slots = 1 + torch.arange(count)
    seqs.block_table = 1 + torch.arange(pages * count).view(count, pages)
    seqs.context_lens = torch.zeros(count, dtype=torch.int64)
    seqs.max_context = max(lengths)
    return seqs


def gradients(model: SSEForCausalLM, rows: list[list[Tensor]]) -> dict[str, Tensor]:
    """Gradients of a loss over all tokens of all rows."""
    model.zero_grad()
    for row in rows:
        out = model.packed(torch.cat(row), packed_inputs([len(s) for s in row]))
        logits = model.logits(out.hidden)
        torch.nn.functional.cross_entropy(logits, torch.cat(row), reduction="sum").backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ORDERS)
def test_a_packed_sequence_gives_the_outputs_that_it_gives_alone(model, order):
    with torch.no_grad():
        out = model.packed(torch.cat(sequences(order)), packed_inputs(list(order)))
        for tokens, hidden, ids in zip(
            sequences(order), out.hidden.split(order), out.routing_ids.split(order), strict=True
        ):
            alone = model.packed(tokens, packed_inputs([len(tokens)]))
            assert (alone.hidden - hidden).abs().max() < TOLERANCE
            assert torch.equal(alone.routing_ids, ids)


def test_a_packed_sequence_leaves_the_state_that_it_leaves_alone(model):
    order = ORDERS[1]
    with torch.no_grad():
        seqs = with_cache(model, list(order))
        cached = model.packed(torch.cat(sequences(order)), seqs).hidden
        plain = model.packed(torch.cat(sequences(order)), packed_inputs(list(order))).hidden
        assert (cached - plain).abs().max() < TOLERANCE
        for row, tokens in enumerate(sequences(order)):
            alone = with_cache(model, [len(tokens)])
            model.packed(tokens, alone)
            for packed, single in zip(seqs.cache.slotted(), alone.cache.slotted(), strict=True):
                assert (packed[1 + row] - single[1]).abs().max() < TOLERANCE


def test_packing_does_not_change_the_gradients(model):
    order = ORDERS[2]
    packed = gradients(model, [sequences(order)])
    alone = gradients(model, [[s] for s in sequences(order)])
    assert packed.keys() == alone.keys() == dict(model.named_parameters()).keys()
    for name, gradient in alone.items():
        difference = (packed[name] - gradient).abs().max()
        assert difference <= TOLERANCE * max(1, gradient.abs().max()), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    order = (7, 64, 1, 30)
    width = max(order) + 3
    ids = torch.zeros(len(order), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences(order)):
        begin = width - len(tokens) if side == "left" else 0
        ids[row, begin : begin + len(tokens)] = tokens
        mask[row, begin : begin + len(tokens)] = 1
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for row, tokens in enumerate(sequences(order)):
            alone = model(tokens[None]).logits[0]
            assert (logits[row][mask[row].bool()] - alone).abs().max() < TOLERANCE


def test_every_way_to_name_the_boundaries_of_a_packed_row_is_understood(gla_model):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    order = (5, 17, 3)
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator([{"input_ids": s.tolist()} for s in sequences(order)])
    with torch.no_grad():
        expected = gla_model.packed(torch.cat(sequences(order)), packed_inputs(list(order))).hidden
        expected = gla_model.logits(expected)
        everything = gla_model(**batch, use_cache=False)
        assert torch.equal(everything.logits[0], expected)
        for key in ("cu_seq_lens_q", "seq_idx", "position_ids"):
            named = gla_model(batch["input_ids"], **{key: batch[key]})
            assert torch.equal(named.logits[0], expected), key


def test_the_loss_of_a_packed_row_leaves_out_each_first_token(gla_model):
    order = (5, 17, 3)
    labels = torch.cat(sequences(order))[None]
    bounds = torch.tensor([0, 5, 22, 25], dtype=torch.int32)
    packed = gla_model(labels, labels=labels, cu_seq_lens_q=bounds, num_items_in_batch=1)
    summed = torch.tensor(0.0)
    for tokens in sequences(order):
        alone = gla_model(tokens[None], labels=tokens[None], num_items_in_batch=1)
        summed += (alone.loss - 0.01 * alone.aux_loss).detach()
    assert torch.allclose(packed.loss - 0.01 * packed.aux_loss, summed, rtol=1e-5)


def test_wrong_boundaries_are_refused(gla_model):
    ids = torch.ones(1, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        gla_model(ids, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    with pytest.raises(ValueError, match="attention_mask"):
        gla_model(ids, attention_mask=torch.zeros(1, 10))
    with pytest.raises(ValueError, match="attention_mask"):
        gla_model(ids, attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="routing"):
        gla_model(ids, routing=torch.zeros(1, 9, 3, 1, dtype=torch.uint8))
    with torch.no_grad(), pytest.raises(ValueError, match="use_cache"):
        gla_model(ids, cu_seq_lens_q=torch.tensor([0, 4, 10]), use_cache=True)
