"""GRPO steps on one GPU, engine and learner in one process: how far do their log-probs differ?

    python benchmarks/grpo_gpu.py            # writes results/grpo-gpu-<device>.json

A fresh SSE-H answers random prompts and is rewarded for even ids; with --model and --problems, a
trained one answers real problems, is graded, and learns, and then answers held-out ones:

    python benchmarks/grpo_gpu.py --model runs/gsm8k_smollm2/sft --problems gsm8k_train.jsonl \
        --held-out gsm8k_test.jsonl

Each case is run for a few steps from the same weights, with the routing replayed and not, states in
fp32 and bf16; both sides run the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_file import add_options, header, save
from sse_rewards import score

from sse_rl.data.problems import load_problems
from sse_rl.data.prompts import drop_long, render
from sse_rl.data.stream import PromptStream
from sse_rl.data.tokenizer import end_token_ids, named_tokenizer
from sse_rl.learner.step import Learner
from sse_rl.model import SSEConfig, SSEForCausalLM
from sse_rl.pipeline.evaluate import load_policy
from sse_rl.recipe import Data, Grpo, Source
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
    parser.add_argument("--model", help="a folder; the fresh model's shape is not used then")
    parser.add_argument("--problems", help="JSONL, for --model")
    parser.add_argument("--held-out", help="JSONL, answered after the last step, for --model")
    parser.add_argument("--held-out-samples", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    add_options(parser)
    options = parser.parse_args()
    if bool(options.model) != bool(options.problems) or (options.held_out and not options.model):
        parser.error("--model and --problems go together, and --held-out with them")
    task = Task.of(options)
    rows = []
    for variant in (task.variant,) if task else ("gla", "gdn"):
        for replay in (True, False):
            for state in ("float32", "bfloat16"):
                rows.append(run(options, variant, replay, state, task))
                print(json.dumps(rows[-1]), flush=True)
                write(options, rows)


@dataclass(frozen=True, slots=True)
class Task:
    """A trained model and real problems, in the order they are asked, and held-out ones."""

    model: Path
    variant: str
    prompts: list[Prompt]
    held_out: list[Prompt]
    tokenizer: Any

    @classmethod
    def of(cls, options: argparse.Namespace) -> Task | None:
        if options.model is None:
            return None
        tokenizer = named_tokenizer(options.model, None)

        def prompts(path: str) -> list[Prompt]:
            data = Data(tokenizer=options.model, train=Source(path=path))
            return drop_long(
                render(load_problems(data.train), tokenizer, data), options.prompt_tokens
            )

        stream = PromptStream(prompts(options.problems), seed=0)
        dealt = [stream[i] for i in range(options.steps * options.prompts)]
        held_out = prompts(options.held_out) if options.held_out else []
        variant = SSEConfig.from_pretrained(options.model).linear_attn_type
        return cls(Path(options.model), variant, dealt, held_out, tokenizer)


def fresh(options: argparse.Namespace, variant: str) -> SSEForCausalLM:
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
    return SSEForCausalLM(config)


def run(
    options: argparse.Namespace, variant: str, replay: bool, state: str, task: Task | None
) -> dict[str, Any]:
    """Some GRPO steps of one case. Speeds are the last step's, after warm-up by those before; where
    the model is a trained one, the rest are means over the steps, maxima apart."""
    dtype = getattr(torch, options.dtype)
    load = lambda: load_policy(task.model) if task else fresh(options, variant)
    policy = load().to(options.device, dtype)
    actor = load().to(options.device, dtype).eval().requires_grad_(False)
    longest = options.prompt_tokens + options.tokens
    sequences = options.prompts * options.answers
    engine = Engine(
        actor,
        max_num_seqs=sequences,
        num_pages=sequences * -(-longest // PAGE) + 1,
        page_size=PAGE,
        max_num_batched_tokens=8192,
        eos_token_ids=end_token_ids(task.tokenizer) if task else (0,),
        max_model_len=longest,
        state_dtype=getattr(torch, state),
    )
    grpo = Grpo(
        max_steps=options.steps,
        prompts_per_step=options.prompts,
        num_generations=options.answers,
        max_completion_length=options.tokens,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_tokens_per_micro_batch=32768,
        routing_replay=replay,
    )
    learner = Learner(policy, grpo, device=options.device)
    steps: list[dict[str, float]] = []
    for step in range(options.steps):
        engine.set_weights(learner.weights(), step)
        began = time.perf_counter()
        groups = answers(engine, asked(options, step, task), options, options.answers, seed=step)
        generated = time.perf_counter()
        sampled = sum(len(t.token_ids) for group in groups for t in group.trajectories)
        if task:
            grade(groups, task)
        graded = time.perf_counter()
        metrics = learner.step(groups)
        learned = time.perf_counter()
        metrics["rollout_tokens_per_s"] = sampled / (generated - began)
        metrics["learner_tokens_per_s"] = metrics["tokens"] / (learned - graded)
        steps.append(metrics)
    case = f"{variant}, replay {'on' if replay else 'off'}, {state} state"
    row: dict[str, Any] = {"case": case, "steps": options.steps}
    if task is None:
        return row | {name: steps[-1][name] for name in (*MEANS, *MAXIMA, *SPEEDS)}
    row |= {name: sum(s[name] for s in steps) / len(steps) for name in (*MEANS, *TRAINED)}
    row |= {name: max(s[name] for s in steps) for name in (*MAXIMA, "importance_ratio/max")}
    row |= {name: steps[-1][name] for name in SPEEDS}
    row |= {"rewards": [round(s["reward"], 4) for s in steps]}
    if task.held_out:
        engine.set_weights(learner.weights(), options.steps)
        groups = answers(engine, task.held_out, options, options.held_out_samples, seed=0)
        grade(groups, task)
        scores = [t.reward or 0.0 for group in groups for t in group.trajectories]
        row["held_out"] = sum(scores) / len(scores)
    return row


MEANS = ("rollout_logprob_diff_mean", "rollout_kl", "flip_rate", "grad_norm")
TRAINED = ("reward", "entropy", "correction_share", "completion_length/mean")
MAXIMA = ("rollout_logprob_diff_max",)
SPEEDS = ("rollout_tokens_per_s", "learner_tokens_per_s")


def asked(options: argparse.Namespace, step: int, task: Task | None) -> list[Prompt]:
    """The prompts of a step."""
    if task:
        return task.prompts[step * options.prompts : (step + 1) * options.prompts]
    generator = torch.Generator().manual_seed(step)
    shape = (options.prompts, options.prompt_tokens)
    ids = torch.randint(1, 4096, shape, generator=generator).tolist()
    return [Prompt(str(i), tuple(row), "") for i, row in enumerate(ids)]


def answers(
    engine: Engine, prompts: list[Prompt], options: argparse.Namespace, samples: int, *, seed: int
) -> list[Group]:
    params = SamplingParams(
        n=samples, max_tokens=options.tokens, ignore_eos=options.model is None, seed=seed
    )
    requests = [Request(str(i), prompt.token_ids, params) for i, prompt in enumerate(prompts)]
    return [
        Group(i, prompts[i], [trajectory(c) for c in completions])
        for i, completions in enumerate(engine.generate(requests))
    ]


def grade(groups: list[Group], task: Task) -> None:
    for group in groups:
        for answer in group.trajectories:
            ids = answer.token_ids.tolist()
            answer.text = task.tokenizer.decode(ids, skip_special_tokens=True)
            answer.reward = score(answer.text, group.prompt.answer).reward


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
    name = "mismatch" if options.model else "grpo-gpu"
    given = {k: v for k, v in sorted(vars(options).items()) if k not in ("commit", "out") and v}
    places = {
        "model": "runs/gsm8k_smollm2/sft",
        "problems": "gsm8k_train.jsonl",
        "held_out": "gsm8k_test.jsonl",
    }
    shown = " ".join(f"--{k.replace('_', '-')} {places.get(k, v)}" for k, v in given.items())
    command = f"python benchmarks/grpo_gpu.py {shown if options.model else ''}".strip()
    result = {
        "name": name,
        **header(options.device, command, options.commit),
        "shape": {
            key: value
            for key, value in vars(options).items()
            if key not in ("device", "commit", "out", "model", "problems", "held_out")
        },
        "rows": rows,
    }
    save(result, options.out, name)


if __name__ == "__main__":
    main()
