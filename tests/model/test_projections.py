"""The fused projections of a decode step are the layer's own, and follow its weights."""

from __future__ import annotations

import copy
import importlib.util
from unittest import mock

import pytest
import torch
from torch import Tensor

from sse_rl.model import PackedInputs, SlotCache, packed_inputs
from sse_rl.model.joined import joined, product, products
from sse_rl.model.projections import (
    _reading,
    fused_inputs,
    join_block,
    join_projections,
    reading_layers,
)

needs_interpreter = pytest.mark.skipif(
    not importlib.util.find_spec("triton") or torch.cuda.is_available(),
    reason="needs triton's interpreter",
)
BATCH = 18


def one_step(model) -> PackedInputs:
    cache = SlotCache(model.config, slots=20, pages=1, dtype=torch.float32, device="cpu")
    for window in (x for pair in cache.conv for x in pair):
        window.normal_()
    return PackedInputs(
        cu_seqlens=torch.arange(BATCH + 1),
        positions=torch.zeros(BATCH, dtype=torch.int64),
        max_seqlen=1,
        cache=cache,
        slots=torch.randperm(20)[:BATCH],
    )


def flat(inputs) -> list[Tensor]:
    gate = [] if inputs.gate is None else [inputs.gate]
    return [*inputs[:5], *inputs.decays, *gate, inputs.logits]


@needs_interpreter
@torch.no_grad()
def test_fused_inputs_are_those_of_the_layer(model):
    mixer = model.model.layers[1].attn
    for parameter in mixer.parameters():
        parameter.normal_()  # biases start as zeros
    x, start = torch.randn(BATCH, 32), one_step(model)
    plain, *fused = (copy.deepcopy(start) for _ in range(3))
    expected = flat(mixer._inputs(x, plain))
    for join, seqs in zip((False, True), fused, strict=True):
        if join:
            join_projections(mixer)
        found = flat(fused_inputs(mixer, x, seqs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert seqs.cache is not None and plain.cache is not None
        for mine, right in zip(seqs.cache.conv, plain.cache.conv, strict=True):
            assert all(map(torch.equal, mine, right))


def test_products_are_those_of_the_layers_and_so_are_their_gradients(model):
    """Where tensors are on a GPU the products are one: so they are for a tensor that says so."""
    mixer = model.double().model.layers[0].attn
    layers = [mixer.get_submodule(name) for name in reading_layers(mixer)]
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(layer.weight for layer in layers)]
    apart = products(x, layers)
    assert product(x, layers) is None
    with mock.patch.object(Tensor, "is_cuda", True):
        together = products(x, layers)
    assert together[0].data_ptr() != apart[0].data_ptr() and not together[0].is_contiguous()
    slopes = [torch.randn_like(y) for y in apart]
    found, wanted = (torch.autograd.grad(ys, inputs, slopes) for ys in (together, apart))
    for a, b in zip((*together, *found), (*apart, *wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["bias", "adapter", "dtype"])
def test_layers_that_are_not_plain_are_called(kind):
    layers = [torch.nn.Linear(4, 2, bias=kind == "bias"), torch.nn.Linear(4, 3, bias=False)]
    if kind == "adapter":
        layers[1] = torch.nn.Sequential(layers[1])
    if kind == "dtype":
        layers[1].bfloat16()
    with mock.patch.object(Tensor, "is_cuda", True):
        assert product(torch.randn(5, 4), layers) is None


@torch.no_grad()
def test_joined_weights_are_the_parameters_themselves(model):
    mixer, x = model.model.layers[0].attn, torch.randn(3, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    join_projections(mixer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    whole = joined(_reading(mixer))
    assert whole is not None
    mixer.v_proj.weight.fill_(2.0)
    keys = 2 * len(mixer.q_proj.weight)
    torch.testing.assert_close(x @ whole[keys], 2 * x.sum(-1))
    model.double()
    assert joined(_reading(mixer)) is None  # each was converted by itself


def test_a_joined_model_is_saved_and_loaded_like_any_other(gla_model, tmp_path):
    for layer in (0, 1, 3):
        join_block(gla_model.model.layers[layer])
    gla_model.save_pretrained(tmp_path)
    loaded = type(gla_model).from_pretrained(tmp_path).state_dict()
    for name, tensor in gla_model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@torch.no_grad()
def test_a_joined_model_gives_what_it_gave_before(model):
    ids = torch.arange(40) % 50
    before = model.packed(ids, packed_inputs([30, 10])).hidden
    for layer in model.model.layers:
        join_block(layer)
        assert joined([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]) is not None
    after = model.packed(ids, packed_inputs([30, 10])).hidden
    torch.testing.assert_close(after, before, rtol=0, atol=3e-5)
    with torch.enable_grad():
        model.packed(ids, packed_inputs([30, 10])).hidden.sum().backward()
    assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())
