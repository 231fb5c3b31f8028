from collections.abc import Callable

import numpy as np
import pytest
import torch

from sse_rl.model import PackedInputs, SSEForCausalLM
from sse_rl.rollout.engine import Engine
from sse_rl.types import Completion, Request, SamplingParams

# Largest difference seen on CPU in fp32, 45 completions of 100 tokens at temperature 1: 2.4e-6.
LOGPROB_TOLERANCE = 1e-5


def forward_logprobs(
    model: SSEForCausalLM, request: Request, completion: Completion, *, replay: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of a completion by one plain forward, and the partitions it chose."""
    prompt, sampled = request.prompt_token_ids, completion.token_ids.tolist()
    fed = torch.tensor([*prompt, *sampled[:-1]])
    seqs = PackedInputs(
        cu_seqlens=torch.tensor([0, len(fed)]),
        positions=torch.arange(len(fed)),
        max_seqlen=len(fed),
        replay=torch.from_numpy(completion.routing) if replay else None,
    )
    output = model.packed(fed, seqs)
    logits = model.logits(output.hidden[len(prompt) - 1 :])
    logprobs = (logits / (request.params.temperature or 1.0)).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(sampled)[:, None])[:, 0]
    return chosen.numpy(), output.routing_ids.numpy()


VARIANTS = [
    ("gla", {}),
    ("gdn", {}),
    ("gla", {"use_short_conv": True, "num_writer": 2, "num_reader": 2, "attn": None}),
    ("gdn", {"use_short_conv": True, "num_hidden_layers": 4}),
    ("gdn", {"attn": {"layers": [0, 2], "num_heads": 2, "num_kv_heads": 1, "window_size": 9}}),
]


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_and_routing_are_those_of_a_plain_forward(
    tiny_model, make_engine, make_request, kind: str, options: dict, temperature: float
):
    model = tiny_model(kind, **options)
    requests = [
        make_request(i, n, n=2, temperature=temperature) for i, n in enumerate((1, 40, 130))
    ]
    for request, completions in zip(
        requests, make_engine(model, max_num_batched_tokens=64).generate(requests), strict=True
    ):
        for completion in completions:
            logprobs, routing = forward_logprobs(model, request, completion)
            np.testing.assert_allclose(
                completion.logprobs, logprobs, atol=LOGPROB_TOLERANCE, rtol=0
            )
            np.testing.assert_array_equal(routing, completion.routing)
            length = len(request.prompt_token_ids) + len(completion.token_ids) - 1
            assert completion.routing.shape[0] == length


def test_the_partitions_recorded_are_those_the_router_would_choose(
    tiny_model, make_engine, make_request
):
    model = tiny_model()
    request = make_request(0, 100)
    [[completion]] = make_engine(model).generate([request])
    _, routing = forward_logprobs(model, request, completion, replay=False)
    assert (routing != completion.routing).mean() < 0.02


def test_a_sample_with_a_seed_of_its_own_equals_a_request_with_that_seed(
    tiny_model, make_engine, make_request
):
    model, seeds = tiny_model("gdn"), (7, 2**31 - 1, 7)
    [together] = make_engine(model).generate([make_request(0, 70, n=3, seeds=seeds)])
    for seed, sample in zip(seeds, together, strict=True):
        [[alone]] = make_engine(model).generate([make_request(0, 70, seed=seed)])
        np.testing.assert_array_equal(sample.token_ids, alone.token_ids)
        np.testing.assert_array_equal(sample.logprobs, alone.logprobs)
    with pytest.raises(ValueError, match=r"seeds must be one for each of n = 2 .* got \(7,\)"):
        make_engine(model).add(make_request(1, 5, n=2, seeds=(7,)))


@pytest.mark.parametrize("length", [5, 64, 70])
def test_forked_samples_equal_samples_with_a_prefill_of_their_own(
    tiny_model, make_engine, make_request, length: int
):
    model = tiny_model("gdn", use_short_conv=True)
    request = make_request(0, length, n=4)
    [forked] = make_engine(model).generate([request])
    engine = make_engine(
        model, max_num_seqs=1
    )  # each wave of one sample forks from the kept prompt
    [waves] = engine.generate([request])
    for ours, theirs in zip(forked, waves, strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
        logprobs, _ = forward_logprobs(model, request, ours)
        np.testing.assert_allclose(ours.logprobs, logprobs, atol=LOGPROB_TOLERANCE, rtol=0)
    assert engine.stats.prefill_tokens == length
    assert len({tuple(sample.token_ids.tolist()) for sample in forked}) > 1


def test_temperature_zero_takes_the_likeliest_token(tiny_model, make_engine, make_request):
    model = tiny_model()
    request = make_request(3, 10, temperature=0.0, ignore_eos=True, n=2)
    [[first, second]] = make_engine(model).generate([request])
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    hidden = model.packed(
        torch.tensor([*request.prompt_token_ids, *first.token_ids.tolist()[:-1]]),
        PackedInputs(torch.tensor([0, 21]), torch.arange(21), 21),
    ).hidden
    np.testing.assert_array_equal(model.logits(hidden[9:]).argmax(-1), first.token_ids)


def test_the_seed_alone_decides(tiny_model, make_engine, make_request):
    model = tiny_model()

    def run(seed: int, engine_seed: int = 0) -> list[int]:
        request = make_request(0, 10, ignore_eos=True)
        request = Request("a", request.prompt_token_ids, SamplingParams(max_tokens=12, seed=seed))
        [[completion]] = make_engine(model, seed=engine_seed).generate([request])
        return completion.token_ids.tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1) != run(1, engine_seed=1)


def finish(engine: Engine, request: Request) -> Completion:
    [[completion]] = engine.generate([request])
    return completion


def test_every_reason_to_finish(tiny_model, make_engine, make_request):
    model = tiny_model()
    letters = lambda tokens: "".join(chr(ord("0") + token) for token in tokens)
    engine = make_engine(model, eos_token_ids=(), decode=letters)
    free = finish(engine, make_request(1, 10))
    tokens = free.token_ids.tolist()
    assert (free.finish_reason, free.stop_reason, len(tokens)) == ("length", None, 12)

    at = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    by_id = finish(engine, make_request(1, 10, stop_token_ids=(tokens[at], 1000)))
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", tokens[at])
    assert by_id.token_ids.tolist() == tokens[: at + 1]

    string = letters(tokens[at - 1 : at + 1])
    by_string = finish(engine, make_request(1, 10, stop=("no such text", string)))
    assert (by_string.finish_reason, by_string.stop_reason) == ("stop", string)
    assert by_string.token_ids.tolist() == tokens[: at + 1]

    ending = make_engine(model, eos_token_ids=(tokens[at],))
    by_end = finish(ending, make_request(1, 10, stop_token_ids=(tokens[at],)))
    assert (by_end.finish_reason, by_end.stop_reason) == ("stop", None)
    assert by_end.token_ids.tolist() == tokens[: at + 1]
    assert len(finish(ending, make_request(1, 10, ignore_eos=True)).token_ids) == 12

    short = finish(make_engine(model, eos_token_ids=(), max_model_len=15), make_request(1, 10))
    assert (short.finish_reason, short.token_ids.tolist()) == ("length", tokens[:5])
    one = finish(engine, make_request(1, 10, max_tokens=1))
    assert one.token_ids.tolist() == tokens[:1] and one.routing.shape[0] == 10


def test_weights_are_swapped_between_two_tokens(tiny_model, make_engine, make_request):
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    request = make_request(0, 10, n=2, ignore_eos=True)
    [before] = make_engine(model).generate([request])
    engine = make_engine(model)
    engine.add(request)
    for _ in range(4):
        engine.step()
    engine.set_weights(other.state_dict(), version=7)
    engine.add(make_request(1, 10))
    completions = []
    while engine.busy:
        completions += engine.step()
    assert engine.version == 7
    swapped = sorted(completions[:2], key=lambda completion: completion.index)
    for ours, theirs in zip(swapped, before, strict=True):
        assert ours.versions.tolist() == [0] * 5 + [7] * 7
        np.testing.assert_array_equal(ours.token_ids[:5], theirs.token_ids[:5])
        assert (ours.logprobs[5:] != theirs.logprobs[5:]).all()
    assert set(completions[2].versions.tolist()) == {7}
    fresh = finish(make_engine(other), make_request(1, 10))
    np.testing.assert_array_equal(completions[2].logprobs, fresh.logprobs)
    engine.set_weights(old, version=8)
    [after] = engine.generate([request])
    np.testing.assert_array_equal(after[0].logprobs, before[0].logprobs)


def test_weights_that_do_not_fit_change_nothing(tiny_model, make_engine):
    engine = make_engine(tiny_model())
    name = "lm_head.weight"
    state = {key: tensor + 1 for key, tensor in tiny_model().state_dict().items()}
    before = tiny_model().state_dict()
    partial = {key: tensor for key, tensor in state.items() if key != name}
    for bad, message in [
        (partial, "missing .*lm_head.weight"),
        (state | {"other": torch.zeros(1)}, "unknown .*other"),
        (state | {name: torch.zeros(3, 3)}, r"lm_head.weight has shape \(3, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.set_weights(bad, version=1)
    assert engine.version == 0
    now = engine._runner.model.state_dict()
    assert all(torch.equal(now[key], before[key]) for key in before)


def test_logits_that_are_not_numbers_stop_the_run(tiny_model, make_engine, make_request):
    engine = make_engine(tiny_model())
    state = {name: tensor * torch.nan for name, tensor in tiny_model().state_dict().items()}
    engine.set_weights(state, version=3)
    with pytest.raises(FloatingPointError, match=r"'r0', sample 0: .* version 3"):
        engine.generate([make_request(0, 10)])
    assert not engine.busy
    engine.add(make_request(1, 10))
    with pytest.raises(FloatingPointError):
        engine.step()
    assert engine.abort("r1") == []  # it runs, and has no token yet


def test_an_aborted_request_returns_what_it_has_and_frees_its_place(
    tiny_model, make_engine, make_request
):
    model = tiny_model()
    engine = make_engine(model, max_num_seqs=2)
    engine.add(make_request(0, 10, n=3, ignore_eos=True))
    engine.add(make_request(1, 10, n=2))
    for _ in range(3):
        engine.step()
    partial = engine.abort("r0")
    assert [(c.index, c.finish_reason, len(c.token_ids)) for c in partial] == [
        (0, "abort", 4),
        (1, "abort", 4),
    ]
    completions = []
    while engine.busy:
        completions += engine.step()
    [undisturbed] = make_engine(model).generate([make_request(1, 10, n=2)])
    for ours, theirs in zip(sorted(completions, key=lambda c: c.index), undisturbed, strict=True):
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
    with pytest.raises(KeyError):
        engine.abort("r0")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", (), SamplingParams()), "'a' has an empty prompt"),
        (Request("a", (3,) * 256, SamplingParams()), "256 tokens, .* max_model_len = 256"),
        (Request("a", (3, 64), SamplingParams()), "from 3 to 64, the vocabulary has 64"),
        (Request("a", (3,), SamplingParams(stop=("x",))), "no decode callable"),
        (Request("a", (3,) * 100, SamplingParams(max_tokens=99)), "needs 4 KV pages of 64"),
        (Request("a", (3,), SamplingParams(top_p=0.0)), "top_p must be"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_and_leaves_the_engine_idle(
    tiny_model, make_engine, make_request, request_: Request, message: str
):
    engine = make_engine(tiny_model(), num_pages=4)
    with pytest.raises(ValueError, match=message):
        engine.generate([make_request(0, 10), request_])
    assert not engine.busy
    assert len(engine.generate([make_request(0, 10)])) == 1


@pytest.mark.parametrize(
    "options",
    [{"max_num_seqs": 0}, {"num_pages": 1}, {"page_size": 8}, {"max_num_batched_tokens": 63}],
    ids=str,
)
def test_impossible_sizes_are_named(tiny_model: Callable, make_engine: Callable, options: dict):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: must be"):
        make_engine(tiny_model(), **options)


def test_stats_count_tokens(tiny_model, make_engine, make_request):
    engine = make_engine(tiny_model(), max_num_seqs=4)
    engine.generate([make_request(0, 10, n=4, ignore_eos=True)])
    stats = engine.stats
    assert (stats.tokens, stats.prefill_tokens, stats.decode_steps) == (48, 10, 11)
    assert stats.slot_use == 1.0 and stats.seconds > 0
