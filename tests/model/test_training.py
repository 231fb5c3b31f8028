"""Routing replay, the auxiliary loss, and what training needs of the model."""

from __future__ import annotations

import pytest
import torch

from sse_rl.model import SSEForCausalLM, load_balance_loss, packed_inputs, partition_share


def tokens(length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(seed))


def test_a_replay_keeps_its_partitions_and_reaches_the_router(model):
    seqs = packed_inputs([25, 15])
    own = model.packed(tokens(), seqs)
    seqs.replay = own.routing_ids
    same = model.packed(tokens(), seqs)
    assert torch.equal(same.hidden, own.hidden)

    partitions = model.config.num_sparse_partition
    seqs.replay = ((own.routing_ids.int() + 1) % partitions).sort(-1).values.to(torch.uint8)
    other = model.packed(tokens(), seqs)
    assert torch.equal(other.routing_ids, seqs.replay)
    assert not torch.equal(other.hidden, own.hidden)
    other.hidden.square().sum().backward()
    for layer in model.config.sse_layers:
        gradient = model.model.layers[layer].attn.e_proj.weight.grad
        gated = model.config.linear_attn_type == "gla" or model.config.gate_after_norm
        assert (gradient.abs().max() > 1e-6) == gated


def test_forward_takes_the_routing_that_it_returned(gla_model):
    ids = torch.stack((tokens(12, 1), tokens(12, 2)))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        out = gla_model(ids, attention_mask=mask, output_routing=True)
        assert out.routing.shape == (2, 12, 3, 1)
        changed = (out.routing + 1) % 4
        other = gla_model(ids, attention_mask=mask, routing=changed, output_routing=True)
    assert torch.equal(other.routing[mask.bool()], changed[mask.bool()])


def test_the_auxiliary_loss_is_one_when_balanced_and_more_when_not():
    ids = torch.tensor([[0, 1], [2, 3]])
    uniform = torch.full((2, 4), 0.25)
    assert load_balance_loss(uniform, ids).item() == pytest.approx(1)
    skewed = torch.tensor([[0.7, 0.3, 0, 0]]).expand(2, 4)
    assert load_balance_loss(skewed, torch.tensor([[0, 1], [0, 1]])).item() == pytest.approx(2)


def test_the_auxiliary_loss_of_a_batch_is_the_sum_over_its_parts():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(30, 6, generator=generator).softmax(-1)
    ids = probs.topk(2).indices
    share = partition_share(ids, 6)
    parts = [
        load_balance_loss(p, i, share=share, tokens=30)
        for p, i in zip(probs.split([7, 20, 3]), ids.split([7, 20, 3]), strict=True)
    ]
    assert torch.allclose(sum(parts), load_balance_loss(probs, ids))


def test_the_auxiliary_loss_teaches_the_router_of_gdn(tiny_config):
    model = SSEForCausalLM(tiny_config(linear_attn_type="gdn"))
    out = model(tokens()[None], labels=tokens()[None])
    out.loss.backward()
    for layer in model.config.sse_layers:
        assert model.model.layers[layer].attn.e_proj.weight.grad.abs().max() > 1e-6


def test_gradient_checkpointing_changes_no_gradient(model):
    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(tokens()[None], labels=tokens()[None])
        out.loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name


def test_hidden_states_are_the_input_of_each_layer_and_the_final_norm(gla_model):
    ids = tokens()[None]
    with torch.no_grad():
        out = gla_model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == gla_model.config.num_hidden_layers + 1
    assert torch.equal(gla_model.logits(out.hidden_states[-1]), out.logits)


def test_a_model_learns_a_repeated_sequence(tiny_config):
    torch.manual_seed(0)
    model = SSEForCausalLM(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    row = tokens(16).repeat(3)[None]
    losses = []
    for _ in range(20):
        loss = model(row, labels=row).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
