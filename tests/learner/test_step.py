from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sse_rl.learner import optimizer
from sse_rl.learner.step import Learner

LOSSES: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "dr_grpo"},
    {"loss_type": "dapo", "beta": 0.1},
    {"loss_type": "bnpo", "num_iterations": 2},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
]


def weights_of(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights().items()}


def perturb(groups, scale: float = 0.1, seed: int = 1):
    """As if an older policy had sampled."""
    rng = np.random.default_rng(seed)
    for group in groups:
        for trajectory in group.trajectories:
            noise = rng.normal(0, scale, len(trajectory.logprobs))
            trajectory.logprobs = (trajectory.logprobs + noise).astype(np.float32)
    return groups


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("changes", LOSSES, ids=lambda c: " ".join(map(str, c.values())))
@pytest.mark.parametrize("kind", ["gla", "gdn"])
def test_shared_prompts_do_not_change_the_update(policy, settings, batch, kind, changes) -> None:
    groups = perturb(batch(policy(linear_attn_type=kind), prompts=4))
    one_token = groups[1].trajectories[0]
    one_token.token_ids, one_token.logprobs = one_token.token_ids[:1], one_token.logprobs[:1]
    one_token.routing = one_token.routing[: len(groups[1].prompt.token_ids)]
    groups[2].trajectories[3].reward = None
    results = []
    for shared in ({}, {"share_prompts": True}, {"share_prompts": True, "budget": 25}):
        budget = shared.pop("budget", 10_000)
        grpo = settings(
            max_tokens_per_micro_batch=budget, router_aux_loss_coef=0.5, **shared, **changes
        )
        reference = policy(initializer_range=0.21, linear_attn_type=kind) if grpo.beta else None
        learner = Learner(policy(linear_attn_type=kind), grpo, reference=reference)
        before = weights_of(learner)
        metrics = learner.step(groups)
        results.append((metrics, {k: v - before[k] for k, v in learner.weights().items()}))
    (whole, update), *others = results
    assert others[0][0]["tokens"] < whole["tokens"]
    assert others[1][0]["num_micro_batches"] > 1
    for metrics, changed in others:
        for name in metrics.keys() - {"tokens", "num_micro_batches"}:
            assert metrics[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
        left, right = (torch.cat([x.flatten() for x in y.values()]) for y in (changed, update))
        assert (left - right).norm() <= 2e-4 * right.norm()  # 8e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("kind", ["gla", "gdn"])
def test_a_gpu_makes_the_update_of_the_cpu(policy, settings, batch, kind, dtype, tolerance) -> None:
    shape = {"linear_attn_type": kind, "hidden_size": 64, "head_dim": 32}
    groups = batch(policy(**shape), prompts=4)
    updates = []
    for device, own, shared in (
        ("cpu", torch.float32, False),
        ("cuda", dtype, False),
        ("cuda", dtype, True),
    ):
        grpo = settings(share_prompts=shared, max_tokens_per_micro_batch=60, learning_rate=0.05)
        learner = Learner(policy(**shape).to(own), grpo, device=device)
        before = [x.detach().clone() for x in learner.optimizer.state_dict()["masters"]] or [
            x.detach().clone() for x in learner.model.parameters()
        ]
        metrics = learner.step(groups)
        after = learner.optimizer.state_dict()["masters"] or list(learner.model.parameters())
        change = [(x - y).flatten() for x, y in zip(after, before, strict=True)]
        updates.append(torch.cat(change).detach().cpu())
        assert metrics["num_micro_batches"] > 1 and metrics["nonfinite"] == 0
    for update in updates[1:]:
        assert (update - updates[0]).norm() <= tolerance * updates[0].norm()


def test_shared_prompts_give_the_same_bits_on_several_threads(policy, settings, batch) -> None:
    groups = batch(policy(), prompts=2, answers=3)
    long = tuple(np.random.default_rng(0).integers(3, 29, 800).tolist())
    for group in groups:
        group.prompt = dataclasses.replace(group.prompt, token_ids=long)
        for trajectory in group.trajectories:
            fed = len(trajectory.token_ids) - 1
            routing = np.zeros((len(long) + fed, *trajectory.routing.shape[1:]), np.uint8)
            routing[:] = np.arange(routing.shape[-1])
            trajectory.routing = routing
    torch.set_num_threads(2)
    updated = []
    for _ in range(2):
        learner = Learner(policy(hidden_size=64, head_dim=32), settings(share_prompts=True))
        learner.step(groups)
        updated.append(weights_of(learner))
    assert same(*updated)


@pytest.mark.parametrize("changes", LOSSES, ids=lambda c: " ".join(map(str, c.values())))
def test_micro_batching_does_not_change_the_update(policy, settings, batch, changes) -> None:
    groups = perturb(batch(policy()))
    groups[1].trajectories[0].finish_reason = "length"
    groups[2].trajectories[3].reward = None
    results = []
    for budget in (10_000, 80, 22):
        grpo = settings(
            max_tokens_per_micro_batch=budget,
            mask_truncated_completions=True,
            router_aux_loss_coef=0.5,
            **changes,
        )
        reference = policy(initializer_range=0.21) if grpo.beta else None
        learner = Learner(policy(), grpo, reference=reference)
        before = weights_of(learner)
        metrics = learner.step(groups)
        results.append((metrics, {k: v - before[k] for k, v in learner.weights().items()}))
    counts = [metrics.pop("num_micro_batches") for metrics, _ in results]
    assert counts[0] == 1 and counts[1] == 2 and counts[2] >= 7
    whole, update = results[0]
    largest = max(float(u.abs().max()) for u in update.values())
    assert largest > 1e-3
    for metrics, other in results[1:]:
        assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-5)
        for name in update:  # measured: 4e-6 of the largest, after two updates
            assert float((update[name] - other[name]).abs().max()) <= 1e-5 * largest, name


def test_packed_gradients_are_those_of_padded_sequences(policy, settings, batch) -> None:
    groups = batch(policy())
    grpo = settings(loss_type="grpo", router_aux_loss_coef=0.0, max_grad_norm=1e9)
    learner = Learner(policy(), grpo)
    before = weights_of(learner)
    learner.step(groups)

    model, total = policy().train(), torch.zeros(())
    for group in groups:
        rewards = np.array([t.reward for t in group.trajectories])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
            ids = torch.tensor([[*group.prompt.token_ids, *trajectory.token_ids]])
            routing = torch.from_numpy(trajectory.routing)
            routing = torch.cat([routing, routing[-1:]])[None]  # the last token counts in no loss
            logits = model(input_ids=ids, routing=routing).logits[0, :-1] / grpo.temperature
            logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            total = total - float(advantage) * logprobs[-len(trajectory.token_ids) :].mean() / 12
    total.backward()
    for name, parameter in model.named_parameters():
        # the first step of AdamW, whose epsilon is 1
        expected = 0.5 * parameter.grad / (parameter.grad.abs() + 1)
        moved = before[name] - learner.weights()[name]
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_replay_repeats_the_rollout(policy, settings, batch) -> None:
    metrics = Learner(policy(), settings()).step(batch(policy()))
    assert metrics["flip_rate"] == 0
    assert metrics["rollout_logprob_diff_max"] < 5e-6  # measured: 9.5e-7
    assert abs(metrics["rollout_kl"]) < 1e-6
    assert metrics["importance_ratio/max"] == pytest.approx(1, abs=1e-4)
    assert metrics["correction_share"] == 0
    assert metrics["clip_ratio"] == 0


def test_replay_holds_where_live_routing_would_differ(policy, settings, batch) -> None:
    sampler = policy()
    groups = batch(sampler)
    drifted = copy.deepcopy(sampler)
    with torch.no_grad():
        for name, parameter in drifted.named_parameters():
            if "e_proj" in name:
                parameter.neg_()
    replayed = Learner(copy.deepcopy(drifted), settings(learning_rate=0.0)).step(groups)
    live = Learner(drifted, settings(learning_rate=0.0, routing_replay=False)).step(groups)
    assert replayed["flip_rate"] > 0.5 and live["flip_rate"] > 0.5
    assert replayed["rollout_kl"] != live["rollout_kl"]


def test_flip_rate_counts_token_and_layer(policy, settings, batch) -> None:
    groups = batch(policy(), prompts=1, answers=2)
    for trajectory in groups[0].trajectories:
        trajectory.routing = trajectory.routing.copy()
    routing = groups[0].trajectories[0].routing
    other = next(n for n in range(4) if n not in routing[0, 0])
    routing[0, 0] = sorted([int(routing[0, 0, 0]), other])
    metrics = Learner(policy(), settings()).step(groups)
    # replaying another partition in the first layer can move the next layer's choices too
    assert metrics["flip_rate"] >= 1 / (2 * metrics["tokens"])
    assert metrics["flip_rate"] < 0.5


def test_the_auxiliary_loss_is_the_models_own_on_the_whole_batch(policy, settings, batch) -> None:
    model = policy()
    groups = batch(model)
    metrics = Learner(model, settings(learning_rate=0.0)).step(groups)
    rows = [
        torch.tensor([*g.prompt.token_ids, *t.token_ids[:-1]])
        for g in groups
        for t in g.trajectories
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=mask.long()).aux_loss
    assert metrics["aux_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["loss"] == pytest.approx(
        metrics["policy_loss"] + model.config.aux_loss_coef * metrics["aux_loss"], rel=1e-5
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_learner_goes_on_bit_for_bit(policy, settings, batch, tied: bool) -> None:
    grpo = settings(
        adam_epsilon=1e-8, learning_rate=1e-3, warmup_steps=2, lr_scheduler_type="linear"
    )
    model = lambda: policy(tie_word_embeddings=tied)
    groups = [perturb(batch(policy(), seed=seed), seed=seed) for seed in range(4)]
    straight = Learner(model(), grpo)
    expected = [straight.step(g) for g in groups]

    first = Learner(model(), grpo)
    metrics = [first.step(g) for g in groups[:2]]
    state = first.state_dict()
    if tied:  # as a file keeps it
        del state["model"]["lm_head.weight"]
    file = io.BytesIO()
    torch.save(state, file)
    second = Learner(policy(initializer_range=0.3, tie_word_embeddings=tied), grpo)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    metrics += [second.step(g) for g in groups[2:]]

    assert metrics == expected
    assert same(second.weights(), straight.weights())


def test_weights_that_do_not_fit_are_refused(policy, settings) -> None:
    learner = Learner(policy(), settings())
    state = learner.state_dict()
    del state["model"]["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        learner.load_state_dict(state)


def test_learning_rate_zero_leaves_every_bit(policy, settings, batch) -> None:
    learner = Learner(policy(), settings(learning_rate=0.0, weight_decay=0.1))
    before = weights_of(learner)
    learner.step(batch(policy()))
    assert same(before, learner.weights())


def test_the_same_batches_give_the_same_bits(policy, settings, batch) -> None:
    groups = batch(policy())
    left, right = (
        Learner(policy(), settings(max_tokens_per_micro_batch=40, num_iterations=2))
        for _ in range(2)
    )
    assert left.step(groups) == right.step(groups)
    assert same(left.weights(), right.weights())


def test_a_trajectory_without_reward_teaches_nothing(policy, settings, batch) -> None:
    results = []
    for token in (4, 9):
        groups = batch(policy())
        groups[0].trajectories[1].reward = None
        groups[0].trajectories[1].token_ids[:] = token
        learner = Learner(policy(), settings())
        metrics = learner.step(groups)
        results.append(weights_of(learner))
        assert metrics["completion_length/mean"] == np.mean(
            [len(t.token_ids) for g in groups for t in g.trajectories]
        )
    assert same(*results)


def test_a_batch_without_rewards_makes_no_update_but_time_passes(policy, settings, batch) -> None:
    groups = batch(policy())
    for trajectory in [t for g in groups for t in g.trajectories]:
        trajectory.reward = None
    learner = Learner(policy(), settings(lr_scheduler_type="linear", max_steps=4))
    before = weights_of(learner)
    metrics = learner.step(groups)
    assert same(before, learner.weights())
    assert metrics["tokens"] == metrics["loss"] == 0
    assert np.isnan(metrics["reward"])
    assert learner.step(batch(policy()))["learning_rate"] == pytest.approx(0.5 * 3 / 4)


def test_the_second_iteration_is_clipped_against_the_first(policy, settings, batch) -> None:
    groups = batch(policy())
    once = Learner(policy(), settings(epsilon=0.01)).step(groups)
    twice = Learner(policy(), settings(epsilon=0.01, num_iterations=2)).step(groups)
    assert once["clip_ratio"] == 0
    assert twice["clip_ratio"] > 0.1
    assert twice["rollout_kl"] == once["rollout_kl"]


def test_the_kl_starts_at_zero_and_holds_the_policy_back(policy, settings, batch) -> None:
    groups = batch(policy())
    drift = {}
    for beta in (0.0, 1.0):
        learner = Learner(policy(), settings(beta=beta, num_iterations=1), reference=policy())
        drift[beta] = [learner.step(groups)["kl"] for _ in range(4)]
        assert abs(drift[beta][0]) < 1e-6
    assert 0 < drift[1.0][-1] < drift[0.0][-1]
    with pytest.raises(ValueError, match=r"beta = 0\.1"):
        Learner(policy(), settings(beta=0.1))


def test_numbers_that_are_not_finite_are_skipped_and_then_fatal(policy, settings, batch) -> None:
    sound, broken = batch(policy()), batch(policy())
    broken[0].trajectories[0].logprobs = np.full_like(broken[0].trajectories[0].logprobs, np.nan)
    learner = Learner(policy(), settings())
    before = weights_of(learner)
    for _ in range(4):
        assert learner.step(broken)["nonfinite"] == 1
    assert same(before, learner.weights())
    assert learner.step(sound)["nonfinite"] == 0
    after = weights_of(learner)
    for _ in range(4):
        learner.step(broken)
    with pytest.raises(FloatingPointError, match="5 updates in a row"):
        learner.step(broken)
    assert same(after, learner.weights())


def test_decay_spares_norms_biases_and_rates(policy, settings, batch) -> None:
    groups = batch(policy())
    for trajectory in [t for g in groups for t in g.trajectories]:
        trajectory.reward = 1.0
    grpo = settings(weight_decay=0.1, router_aux_loss_coef=0.0)
    learner = Learner(policy(linear_attn_type="gdn"), grpo)
    before = weights_of(learner)
    learner.step(groups)
    for name, tensor in learner.weights().items():
        expected = before[name] * (0.95 if tensor.ndim > 1 else 1.0)
        torch.testing.assert_close(tensor, expected, msg=name)
    assert any("A_log" in name for name in before)


def test_checkpointed_layers_give_the_same_update(policy, settings, batch) -> None:
    groups = batch(policy())
    plain, frugal = (Learner(policy(), settings(gradient_checkpointing=on)) for on in (False, True))
    assert plain.step(groups) == pytest.approx(frugal.step(groups), rel=1e-5, abs=1e-6)
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(tensor, frugal.weights()[name], rtol=1e-5, atol=1e-6)


def test_small_updates_add_up_in_bfloat16(policy, settings, batch) -> None:
    grpo = settings(learning_rate=1e-4, adam_epsilon=1e-8)
    learner = Learner(policy().bfloat16(), grpo)
    groups = batch(policy())
    for _ in range(8):
        metrics = learner.step(groups)
    assert metrics["nonfinite"] == 0
    norm = learner.weights()["model.norm.weight"]
    state = learner.state_dict()["optimizer"]["masters"]
    assert norm.dtype == torch.bfloat16
    assert len(state) == len(list(learner.model.parameters()))
    assert any(1e-4 < float((m - 1).abs().max()) < 2e-3 for m in state if m.shape == norm.shape)


@pytest.mark.parametrize("gathered", [1, 100, 2**25])
def test_gradients_of_bfloat16_are_added_in_float32(settings, monkeypatch, gathered) -> None:
    monkeypatch.setattr(optimizer, "_GATHERED", gathered)
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(3, 2) for _ in range(40)).bfloat16()
    made = optimizer.Optimizer(model, settings(adam_beta1=0.5, max_grad_norm=1e9))
    sums = {p: torch.zeros(p.shape) for p in model[::2].parameters()}
    for _ in range(3):
        x = torch.randn(5, 3).bfloat16()
        loss = sum(layer(x).float().square().sum() for layer in model[::2])
        grads = torch.autograd.grad(loss, list(sums), retain_graph=True)
        for parameter, grad in zip(sums, grads, strict=True):
            sums[parameter] += grad.float()
        loss.backward()
    idle = model[1].weight.clone()
    made.update(loss.detach())
    assert torch.equal(model[1].weight, idle), "no gradient, no step"
    ordered = sorted(model.parameters(), key=lambda p: p.ndim < 2)  # AdamW's matrices come first
    moments = made.state_dict()["adamw"]["state"]
    assert len(moments) == len(sums)
    for place, moment in moments.items():
        assert torch.equal(2 * moment["exp_avg"], sums[ordered[place]])


def test_malformed_batches_are_refused(policy, settings, batch) -> None:
    learner = Learner(policy(), settings())
    with pytest.raises(ValueError, match="a batch needs groups"):
        learner.step([])
    groups = batch(policy())
    groups[0].trajectories[0].reward = float("inf")
    with pytest.raises(ValueError, match="group 0: rewards"):
        learner.step(groups)
    groups = batch(policy())
    groups[0].trajectories[0].routing = groups[0].trajectories[0].routing[1:]
    with pytest.raises(ValueError, match="rows of routing"):
        learner.step(groups)
    groups = batch(policy())
    groups[0].trajectories[0].routing = np.full_like(groups[0].trajectories[0].routing, 7)
    with pytest.raises(ValueError, match="recorded partition 7 of a router over 4"):
        learner.step(groups)
