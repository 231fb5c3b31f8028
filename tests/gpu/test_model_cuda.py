"""The model on a GPU: the same numbers as on CPU, packed = alone, prefill and steps = one pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sse_rl.model import SlotCache, SSEConfig, SSEForCausalLM, packed_inputs
from sse_rl.model.fork import fork_inputs

pytestmark = pytest.mark.gpu

LENGTHS = [1, 63, 64, 65, 130]


def build(kind: str, window: int | None = None) -> SSEForCausalLM:
    torch.manual_seed(0)
    attn = {"layers": [2], "num_heads": 4, "num_kv_heads": 2, "window_size": window}
    config = SSEConfig(
        hidden_size=128,
        head_dim=32,
        num_heads=4,
        num_hidden_layers=4,
        linear_attn_type=kind,
        use_short_conv=True,
        num_writer=1,
        num_reader=1,
        vocab_size=256,
        attn=attn,
        initializer_range=0.1,
    )
    return SSEForCausalLM(config).eval()


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).cuda()


def move(seqs):
    seqs.cu_seqlens, seqs.positions = seqs.cu_seqlens.cuda(), seqs.positions.cuda()
    return seqs


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    difference = (a.float().cpu() - b.float().cpu()).norm() / b.float().cpu().norm()
    assert difference < tolerance, difference.item()


@pytest.mark.parametrize("kind", ["gla", "gdn"])
@pytest.mark.parametrize("window", [None, 24])
@torch.no_grad()
def test_the_gpu_gives_the_outputs_of_the_cpu(kind, window):
    model = build(kind, window)
    ids = tokens(sum(LENGTHS))
    cpu = model.packed(ids.cpu(), packed_inputs(LENGTHS))
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 5e-2)):
        gpu = copy.deepcopy(model).to("cuda", dtype)
        seqs = move(packed_inputs(LENGTHS))
        seqs.replay = cpu.routing_ids.cuda()
        close(gpu.packed(ids, seqs).hidden, cpu.hidden, tolerance)


@pytest.mark.parametrize("kind", ["gla", "gdn"])
def test_a_packed_bf16_row_gives_gradients_to_every_parameter(kind):
    model = build(kind).to("cuda", torch.bfloat16)
    ids = tokens(sum(LENGTHS))
    out = model.packed(ids, move(packed_inputs(LENGTHS)))
    torch.nn.functional.cross_entropy(model.logits(out.hidden), ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("kind", ["gla", "gdn"])
@pytest.mark.parametrize("window", [None, 24])
@torch.no_grad()
def test_prefill_and_steps_equal_one_pass(kind, window, dtype, tolerance):
    model = build(kind, window).to("cuda", dtype)
    ids = tokens(3 * 90).view(3, 90)
    whole = model.packed(ids.flatten(), move(packed_inputs([90] * 3)))
    cache = SlotCache(model.config, slots=4, pages=7, dtype=dtype, device="cuda")
    fed = []
    for begin, end in ((0, 64), (64, 80), *((t, t + 1) for t in range(80, 90))):
        seqs = move(packed_inputs([end - begin] * 3))
        seqs.positions += begin
        seqs.replay = whole.routing_ids.unflatten(0, (3, 90))[:, begin:end].flatten(0, 1)
        seqs.cache, seqs.slots = cache, torch.arange(1, 4, device="cuda")
        seqs.block_table = torch.tensor([[1, 4], [2, 5], [3, 6]], device="cuda")
        seqs.context_lens = torch.full((3,), begin, device="cuda")
        seqs.max_context = end
        fed.append(model.packed(ids[:, begin:end].flatten(), seqs).hidden.unflatten(0, (3, -1)))
    close(torch.cat(fed, 1).flatten(0, 1), whole.hidden, tolerance)


@pytest.mark.parametrize("kind", ["gla", "gdn"])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_behind_one_prompt_equal_whole_trajectories(kind, window, dtype):
    model = build(kind, window).to("cuda", dtype)
    exact = dtype == torch.float32  # in bfloat16 gradients differ by up to 0.12, as rounding does
    prompts, answers, parent = [70, 2], [64, 1, 9], [0, 0, 1]
    ids = tokens(sum(prompts) + sum(answers))
    seqs = move(packed_inputs([*prompts, *answers]))
    seqs.positions += torch.tensor([0, 0, 70, 70, 2], device="cuda").repeat_interleave(
        torch.tensor([*prompts, *answers], device="cuda")
    )
    seqs.fork = fork_inputs(prompts, answers, parent, look_back=3, device="cuda")
    whole = move(packed_inputs([prompts[p] + n for p, n in zip(parent, answers, strict=True)]))
    rows = torch.cat([torch.arange(a, b) for a, b in (
        (0, 70), (72, 136), (0, 70), (136, 137), (70, 72), (137, 146),
    )]).cuda()  # fmt: skip
    expected = model.packed(ids[rows], whole)
    first = torch.cat([torch.arange(a, b) for a, b in (
        (0, 70), (205, 207), (70, 134), (204, 205), (207, 216),
    )]).cuda()  # fmt: skip
    seqs.replay = expected.routing_ids[first]
    cotangent = torch.randn(len(ids), model.config.hidden_size, device="cuda")
    runs = []
    for _ in range(2):
        got = model.packed(ids, seqs).hidden
        runs.append(torch.autograd.grad((got * cotangent).sum(), list(model.model.parameters())))
    close(got, expected.hidden[first], 1e-3 if exact else 5e-2)
    wanted = torch.autograd.grad(
        (expected.hidden[first] * cotangent).sum(), list(model.model.parameters())
    )
    for (name, _), x, again, y in zip(model.model.named_parameters(), *runs, wanted, strict=True):
        assert torch.equal(x, again), name
        if kind == "gdn" and "e_proj" in name:
            continue  # next to nothing: the norm of the keys cancels the router's weight
        assert (x - y).norm() <= (1e-3 if exact else 0.25) * y.norm(), name  # 1e-5 measured


@torch.no_grad()
def test_generate_on_the_gpu_equals_generate_on_the_cpu():
    model = build("gla")
    ids = tokens(40)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cpu = model.generate(ids.cpu(), attention_mask=torch.ones_like(ids).cpu(), **options)
    gpu = model.cuda().generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(cpu, gpu.cpu())
