"""Tokens a second of the rollout engine on one GPU, and where a decode step's time goes.

    python benchmarks/rollout_gpu.py            # writes results/rollout-gpu-<device>.json

Two models with random weights in bf16: the quickstart's, and an SSE-H of the size of SmolLM2-135M
with one layer in four softmax attention. Random prompts of 200 tokens, 8 answers of 300 tokens
each, as many samples as the batch says, all running together. The second of two such rollouts is
timed; the first captures the graphs. Of a step at the full batch it also says how long the GPU
takes when the same graph is replayed, and what the GPU does in it.

With `--queue 4` also what evaluations ask for: four times as many samples as slots, which end at
random after 120 tokens on the average, so that others take their places all the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from result_file import add_options, header, save

from sse_rl.model import SSEConfig, SSEForCausalLM
from sse_rl.rollout.engine import Engine
from sse_rl.types import Request, SamplingParams

PAGE = 64
MODELS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_heads": 3,
        "head_dim": 16,
        "use_short_conv": True,
        "intermediate_size": 256,
        "vocab_size": 259,
        "attn": {"layers": [1], "num_heads": 3},
    },
    "smollm2": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_heads": 9,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attn": {"layers": list(range(2, 30, 4)), "num_heads": 9, "num_kv_heads": 3},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256, 512])
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--queue", type=int, default=0, help="samples a slot, e.g. 4")
    parser.add_argument("--state-dtype", default="float32")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--variant", choices=["gla", "gdn"], default="gla")
    parser.add_argument("--device", default="cuda")
    add_options(parser)
    options = parser.parse_args()
    rows, queued = [], []
    for name in options.models:
        for batch in options.batches:
            rows.append(run(name, batch, options))
            print(json.dumps(rows[-1]), flush=True)
            for answers in (1, 8) if options.queue else ():
                queued.append(queue(name, batch, answers, options))
                print(json.dumps(queued[-1]), flush=True)
            write(options, rows, queued)


def run(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Two rollouts of one model and batch; the figures of the second."""
    engine = build(name, batch, options, options.tokens)
    seconds, before = [], engine.stats
    for seed in range(2):
        before = replace(engine.stats)
        began = time.perf_counter()
        engine.generate(requests(engine, batch, options, seed))
        seconds.append(time.perf_counter() - began)
    inside = engine.stats.seconds - before.seconds
    waited = engine.stats.waited - before.waited
    steps = engine.stats.decode_steps - before.decode_steps
    row = {
        "case": f"{name}, batch {batch}",
        "tokens_per_s": batch * options.tokens / seconds[1],
        "first_rollout_s": seconds[0],
        "ms_per_step": 1e3 * inside / steps,
        "host_ms_per_step": 1e3 * (inside - waited) / steps,
    }
    if engine._runner.graphs is not None:
        row |= step_times(engine)
    return row


def queue(name: str, batch: int, answers: int, options: argparse.Namespace) -> dict[str, Any]:
    """More samples than slots, `answers` a prompt, whose lengths are random: one id in 120 ends
    a sample, and random weights sample all alike."""
    longest = 256
    vocabulary = MODELS[name]["vocab_size"]
    engine = build(name, batch, options, longest, range(1 + vocabulary // 120))
    params = SamplingParams(n=answers, max_tokens=longest, top_p=options.top_p)
    for samples in (batch, batch * options.queue):  # the first captures the graphs
        drawn = prompts(engine, samples // answers, options.prompt_tokens, seed=samples)
        asked = [Request(str(i), ids, replace(params, seed=i)) for i, ids in enumerate(drawn)]
        before, began = replace(engine.stats), time.perf_counter()
        engine.generate(asked)
    seconds, after = time.perf_counter() - began, engine.stats
    steps = after.decode_steps - before.decode_steps
    fed = after.decode_tokens - before.decode_tokens
    return {
        "case": f"{name}, {batch} slots, {answers} a prompt",
        "tokens_per_s": (after.tokens - before.tokens) / seconds,
        "answers_per_s": samples / seconds,
        "mean_tokens": (after.tokens - before.tokens) / samples,
        "prefills": after.prefills - before.prefills,
        "decode_steps": steps,
        "slot_use": fed / steps / batch,
    }


def build(
    name: str, batch: int, options: argparse.Namespace, tokens: int, ends: Iterable[int] = (0,)
) -> Engine:
    torch.manual_seed(0)
    config = SSEConfig(
        num_sparse_partition=4,
        num_writer=1,
        num_reader=1,
        linear_attn_type=options.variant,
        max_position_embeddings=4096,
        **MODELS[name],
    )
    with torch.device(options.device):
        model = SSEForCausalLM(config)
    model = model.to(options.device, torch.bfloat16).requires_grad_(False)
    longest = options.prompt_tokens + tokens
    return Engine(
        model,
        max_num_seqs=batch,
        num_pages=(batch + 1) * -(-longest // PAGE) + 1,
        page_size=PAGE,
        max_num_batched_tokens=16384,
        eos_token_ids=ends,
        max_model_len=longest,
        state_dtype=getattr(torch, options.state_dtype),
    )


def requests(engine: Engine, batch: int, options: argparse.Namespace, seed: int) -> list[Request]:
    params = SamplingParams(
        n=options.answers,
        max_tokens=options.tokens,
        ignore_eos=True,
        seed=seed,
        top_p=options.top_p,
    )
    asked = prompts(engine, batch // options.answers, options.prompt_tokens, seed=seed)
    return [Request(str(i), ids, params) for i, ids in enumerate(asked)]


def prompts(engine: Engine, count: int, tokens: int, *, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, engine._vocab_size, (count, tokens), generator=generator)
    return [tuple(ids) for ids in drawn.tolist()]


def step_times(engine: Engine) -> dict[str, Any]:
    """The largest graph, replayed on the states that the rollout left: ms a step, and of what."""
    graphs = engine._runner.graphs
    assert graphs is not None
    replay = graphs.largest().replay
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        start.record()
        replay.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        replay.replay()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    kernels = 0
    for event in profile.key_averages():
        spent[kind(event.key)] += event.self_device_time_total / 1e3
        kernels += event.count
    return {
        "gpu_ms_per_step": sorted(times)[2],
        "kernels_per_step": kernels,
        "gpu_ms_by_kind": {name: round(ms, 4) for name, ms in spent.most_common()},
    }


def kind(kernel: str) -> str:
    kinds = {
        "sampling": ("sample_kernel",),
        "attention": ("paged_attention", "join_parts", "rotate_kernel"),
        "recurrence": ("layer_step", "layer_inputs", "gla_", "gdn_", "partitions"),
        "products": ("gemm", "gemv", "cutlass", "nvjet", "splitK", "xmma", "cublas"),
    }
    return next((k for k, names in kinds.items() if any(n in kernel for n in names)), "other")


def write(
    options: argparse.Namespace, rows: list[dict[str, Any]], queued: list[dict[str, Any]]
) -> None:
    hidden = ("device", "commit", "out")
    result = {
        "name": "rollout-gpu",
        **header(options.device, " ".join(["python", *sys.argv]), options.commit),
        "shape": {key: value for key, value in vars(options).items() if key not in hidden},
        "rows": rows,
        "queue": queued,
    }
    save(result, options.out, "rollout-gpu")


if __name__ == "__main__":
    main()
