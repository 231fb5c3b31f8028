"""GRPO steps on one GPU, engine and learner in one process: how far do their log-probs differ?

    python benchmarks/grpo_gpu.py            # writes results/grpo-gpu-<device>.json

A fresh SSE-H answers random prompts and is rewarded for even ids. Each case is run for a few steps,
with the routing replayed and not, states in fp32 and bf16; both sides run the same weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sse_rl.learner.step import Learner
from sse_rl.model import SSEConfig, SSEForCausalLM
from sse_rl.recipe import Grpo
from sse_rl.rollout.engine import Engine
from sse_rl.types import Completion, Group, Prompt, Request, SamplingParams, Trajectory

PAGE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--commit", help="where the tree is no git checkout")
    options = parser.parse_args()
    rows = []
    for variant in ("gla", "gdn"):
        for replay in (True, False):
            for state in ("float32", "bfloat16"):
                rows.append(run(options, variant, replay, state))
                print(json.dumps(rows[-1]), flush=True)
    write(options, rows)


def run(options: argparse.Namespace, variant: str, replay: bool, state: str) -> dict[str, Any]:
    """Some GRPO steps of one case; the metrics of the last, after warm-up by those before."""
    torch.manual_seed(0)
    config = SSEConfig(
        vocab_size=4096,
        hidden_size=options.width,
        head_dim=64,
        num_heads=options.width // 64,
        num_hidden_layers=options.layers,
        num_sparse_partition=4,
        num_writer=1,
        num_reader=1,
        linear_attn_type=variant,
        max_position_embeddings=4096,
        attn={"layers": list(range(3, options.layers, 4)), "num_heads": options.width // 64},
    )
    dtype = getattr(torch, options.dtype)
    policy = SSEForCausalLM(config).to(options.device, dtype)
    actor = SSEForCausalLM(config).to(options.device, dtype).eval().requires_grad_(False)
    longest = options.prompt_tokens + options.tokens
    sequences = options.prompts * options.answers
    engine = Engine(
        actor,
        max_num_seqs=sequences,
        num_pages=sequences * -(-longest // PAGE) + 1,
        page_size=PAGE,
        max_num_batched_tokens=8192,
        eos_token_ids=(0,),
        max_model_len=longest,
        state_dtype=getattr(torch, state),
    )
    grpo = Grpo(
        max_steps=options.steps,
        prompts_per_step=options.prompts,
        num_generations=options.answers,
        max_completion_length=options.tokens,
        learning_rate=1e-5,
        routing_replay=replay,
    )
    learner = Learner(policy, grpo, device=options.device)
    metrics: dict[str, float] = {}
    for step in range(options.steps):
        engine.set_weights(learner.weights(), step)
        began = time.perf_counter()
        groups = rollout(engine, options, step)
        generated = time.perf_counter()
        metrics = learner.step(groups)
        learned = time.perf_counter()
        metrics["rollout_tokens_per_s"] = sequences * options.tokens / (generated - began)
        metrics["learner_tokens_per_s"] = metrics["tokens"] / (learned - generated)
    names = (
        "rollout_logprob_diff_mean",
        "rollout_logprob_diff_max",
        "rollout_kl",
        "flip_rate",
        "grad_norm",
        "rollout_tokens_per_s",
        "learner_tokens_per_s",
    )
    case = f"{variant}, replay {'on' if replay else 'off'}, {state} state"
    return {"case": case, "steps": options.steps} | {name: metrics[name] for name in names}


def rollout(engine: Engine, options: argparse.Namespace, step: int) -> list[Group]:
    generator = torch.Generator().manual_seed(step)
    shape = (options.prompts, options.prompt_tokens)
    prompts = torch.randint(1, 4096, shape, generator=generator).tolist()
    params = SamplingParams(
        n=options.answers, max_tokens=options.tokens, ignore_eos=True, seed=step
    )
    requests = [Request(str(i), tuple(ids), params) for i, ids in enumerate(prompts)]
    return [
        Group(i, Prompt(str(i), tuple(prompts[i]), ""), [trajectory(c) for c in completions])
        for i, completions in enumerate(engine.generate(requests))
    ]


def trajectory(completion: Completion) -> Trajectory:
    return Trajectory(
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        routing=completion.routing,
        versions=completion.versions,
        finish_reason=completion.finish_reason,
        reward=float((completion.token_ids % 2 == 0).mean()),
    )


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    cuda = options.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else "cpu"
    commit = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(commit, capture_output=True, text=True, check=False)
    result = {
        "name": "grpo-gpu",
        "device": device,
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if cuda else None,
        "commit": options.commit or found.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
        "command": "python benchmarks/grpo_gpu.py",
        "shape": {
            key: value for key, value in vars(options).items() if key not in ("device", "commit")
        },
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"grpo-gpu-{device.replace(' ', '-').lower()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
