"""A learner's step with prompts read once for all of their answers, and once for each.

    python benchmarks/shared_prompts.py --device cuda

A fresh SSE-H of SmolLM2-135M's shape, ten of 30 layers softmax attention, the others SSE-GDN;
random tokens. Both ways take the same batches in turn; the time is the median of the steps after
the first. On a GPU also its busy time and launches, by the profiler, in a step more, and the most
memory that a step took. Writes results/shared-prompts-<device>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from typing import Any

import numpy as np
import torch
from result_file import add_options, header, save

from sse_rl.learner.step import Learner
from sse_rl.model import SSEConfig, SSEForCausalLM
from sse_rl.recipe import Grpo
from sse_rl.types import Group, Prompt, Trajectory

CASES = ((100, 64), (100, 256), (400, 256))
"""Tokens of a prompt and of each answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--row", type=int, default=32768, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=4)
    add_options(parser)
    options = parser.parse_args()
    rows = []
    for prompt, answer in CASES:
        rows.append(case(options, prompt, answer))
        print(json.dumps(rows[-1]), flush=True)
        write(options, rows)


def case(options: argparse.Namespace, prompt: int, answer: int) -> dict[str, Any]:
    """Tokens fed and seconds taken by a step, either way."""
    policy = fresh(options)
    found: dict[str, Any] = {"prompt": prompt, "answer": answer}
    learners = {
        way: Learner(
            copy.deepcopy(policy),
            Grpo(
                max_steps=options.steps,
                learning_rate=1e-6,
                max_tokens_per_micro_batch=options.row,
                share_prompts=way == "shared",
            ),
            device=options.device,
        )
        for way in ("whole", "shared")
    }
    seconds: dict[str, list[float]] = {way: [] for way in learners}
    for step in range(options.steps):
        groups = batch(options, policy, prompt, answer, seed=step)
        for way, learner in learners.items():
            began = time.perf_counter()
            metrics = learner.step(groups)  # reads its metrics, so the device is done
            seconds[way].append(time.perf_counter() - began)
            found[f"{way} tokens"] = int(metrics["tokens"])
    for way, times in seconds.items():
        found[f"{way} s"] = round(statistics.median(times[1:]), 4)
        if options.device == "cuda":
            found |= {f"{way} {what}": x for what, x in profiled(learners[way], groups).items()}
    return found


def profiled(learner: Learner, groups: list[Group]) -> dict[str, float]:
    """A step more: seconds in which the GPU ran kernels, how many, and the GB that it held."""
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        learner.step(groups)
        torch.cuda.synchronize()
    events = profile.key_averages()
    return {
        "GPU s": round(sum(event.self_device_time_total for event in events) / 1e6, 4),
        "launches": sum(event.count for event in events if event.self_device_time_total > 0),
        "GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def fresh(options: argparse.Namespace) -> SSEForCausalLM:
    torch.manual_seed(0)
    config = SSEConfig(
        vocab_size=49152,
        hidden_size=576,
        head_dim=64,
        num_heads=9,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_sparse_partition=4,
        num_writer=1,
        num_reader=1,
        linear_attn_type="gdn",
        use_short_conv=True,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        attn={"layers": list(range(0, options.layers, 3)), "num_heads": 9, "num_kv_heads": 3},
    )
    return SSEForCausalLM(config).to(options.device, getattr(torch, options.dtype))


def batch(
    options: argparse.Namespace, policy: SSEForCausalLM, prompt: int, answer: int, *, seed: int
) -> list[Group]:
    """Random prompts, answers, choices of the router, and rewards."""
    rng = np.random.default_rng(seed)
    layers, partitions = len(policy.config.sse_layers), policy.config.num_sparse_partition

    def chosen(tokens: int) -> np.ndarray:
        return rng.integers(0, partitions, (tokens, layers, 1)).astype(np.uint8)

    groups = []
    for number in range(options.prompts):
        ids, read = tuple(rng.integers(0, 49152, prompt).tolist()), chosen(prompt)
        trajectories = [
            Trajectory(
                token_ids=rng.integers(0, 49152, answer).astype(np.int32),
                logprobs=np.full(answer, -10.8, np.float32),
                routing=np.concatenate([read, chosen(answer - 1)]),
                versions=np.zeros(answer, np.int32),
                finish_reason="stop",
                reward=float(rng.integers(2)),
            )
            for _ in range(options.answers)
        ]
        groups.append(Group(number, Prompt(str(number), ids, "0"), trajectories))
    return groups


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    cuda = options.device == "cuda"
    command = "python benchmarks/shared_prompts.py " + " ".join(
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(options).items()
        if name not in ("commit", "out")
    )
    device = "cuda" if cuda else f"{platform.machine()} CPU"
    result = {
        **header(device, command, options.commit, triton=False),
        "threads": None if cuda else torch.get_num_threads(),
        "rows": rows,
    }
    save(result, options.out, "shared-prompts")


if __name__ == "__main__":
    main()
