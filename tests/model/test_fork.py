"""Answers behind a prompt that stands once, against every trajectory whole."""

import torch

from sse_rl.model import PackedInputs, packed_inputs
from sse_rl.model.fork import fork_inputs

PROMPTS = [70, 1, 2, 5]
ANSWERS = [3, 66, 1, 9, 4, 20]
PARENT = [0, 0, 1, 2, 2, 3]


def forked(look_back: int) -> PackedInputs:
    inputs = packed_inputs([*PROMPTS, *ANSWERS])
    start = torch.tensor([0] * len(PROMPTS) + [PROMPTS[p] for p in PARENT])
    sizes = torch.tensor([*PROMPTS, *ANSWERS])
    inputs.positions = inputs.positions + start.repeat_interleave(sizes)
    inputs.fork = fork_inputs(PROMPTS, ANSWERS, PARENT, look_back=look_back)
    return inputs


def whole_places() -> tuple[list[int], torch.Tensor]:
    """Lengths of the trajectories, and where each token of the forked row stands among them."""
    lengths = [PROMPTS[p] + n for p, n in zip(PARENT, ANSWERS, strict=True)]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    first = [starts[PARENT.index(p)] for p in range(len(PROMPTS))]
    places = [torch.arange(n) + s for n, s in zip(PROMPTS, first, strict=True)]
    for start, prompt, n in zip(starts, PARENT, ANSWERS, strict=True):
        places.append(start + PROMPTS[prompt] + torch.arange(n))
    return lengths, torch.cat(places)


def test_a_fork_gives_values_and_gradients_of_whole_trajectories(model):
    model = model.double().train()
    torch.manual_seed(0)
    prompts = [torch.randint(1, 50, (n,)) for n in PROMPTS]
    answers = [torch.randint(1, 50, (n,)) for n in ANSWERS]
    lengths, places = whole_places()
    trajectories = torch.cat(
        [x for p, y in zip(PARENT, answers, strict=True) for x in (prompts[p], y)]
    )
    expected = model.packed(trajectories, packed_inputs(lengths))
    got = model.packed(torch.cat([*prompts, *answers]), forked(model.config.conv_size - 1))
    torch.testing.assert_close(got.hidden, expected.hidden[places], atol=1e-9, rtol=0)
    assert torch.equal(got.routing_ids, expected.routing_ids[places])

    cotangent = torch.randn_like(got.hidden)
    parameters = list(model.parameters())
    grads = torch.autograd.grad((got.hidden * cotangent).sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad(
        (expected.hidden[places] * cotangent).sum(), parameters, allow_unused=True
    )
    for (name, _), x, y in zip(model.named_parameters(), grads, wanted, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            # The router is computed in fp32: 5e-7.
            assert (x - y).norm() <= 1e-6 * y.norm(), name


def test_a_row_of_prompts_alone_is_a_packed_row(model):
    model = model.double()
    tokens = torch.randint(1, 50, (sum(PROMPTS),))
    inputs = packed_inputs(PROMPTS)
    expected = model.packed(tokens, packed_inputs(PROMPTS)).hidden
    inputs.fork = fork_inputs(PROMPTS, [], [], look_back=model.config.conv_size - 1)
    torch.testing.assert_close(model.packed(tokens, inputs).hidden, expected, atol=1e-12, rtol=0)
