"""Where the policy comes from: a fresh model or a checkpoint, then the cold start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from sse_rl.errors import UserError
from sse_rl.pipeline import cluster
from sse_rl.pipeline.checkpoint import atomic_folder
from sse_rl.recipe import Recipe
from sse_rl.report.console import RunConsole

INIT, SFT = "init", "sft"
PROGRESS = "sft.jsonl"
POLL_S = 1.0


def initialise(recipe: Recipe, tokenizer: Any, run_dir: Path) -> Path:
    """The folder of the model that the run starts from, written once."""
    target = run_dir / INIT
    if target.exists():
        return target
    import torch

    from sse_rl.model import SSEConfig, SSEForCausalLM

    if recipe.model.path is not None:
        model = SSEForCausalLM.from_pretrained(recipe.model.path)
    else:
        torch.manual_seed(recipe.seed)
        model = SSEForCausalLM(
            SSEConfig(**special_ids(tokenizer) | model_keys(recipe, len(tokenizer)))
        )
    model = model.to(getattr(torch, recipe.model.dtype))
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


def model_keys(recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    """model.config with the tokenizer's vocabulary, unless the recipe states a larger one."""
    keys = dict(recipe.model.config or {})
    stated = keys.setdefault("vocab_size", vocab_size)
    if stated < vocab_size:
        raise UserError(f"model.config.vocab_size = {stated}: the tokenizer has {vocab_size} ids")
    return keys


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """The tokenizer's end, pad and begin tokens under the model config's names."""
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def context_length(recipe: Recipe, vocab_size: int) -> int:
    """The model's context in tokens, from its config alone. Raises UserError for a bad config."""
    from sse_rl.model import SSEConfig
    from sse_rl.pipeline.evaluate import model_folder

    try:
        if recipe.model.path is None:
            config = SSEConfig(**model_keys(recipe, vocab_size))
        else:
            config = SSEConfig.from_pretrained(model_folder(recipe.model.path))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.config: {error}") from None
    return config.max_position_embeddings


def sft(
    recipe: Recipe, run_dir: Path, interrupted: Callable[[], None], console: RunConsole
) -> Path:
    """Run the cold start in a process of its own, on the learner's resources; returns its folder."""
    target = run_dir / SFT
    if target.exists():
        return target
    resources = recipe.cluster
    task = ray.remote(run_sft).options(
        num_cpus=resources.learner_cpus,
        num_gpus=resources.learner_gpus,
        max_retries=0,
        runtime_env=cluster.KEEP_FREED_MEMORY,
    )
    call = task.remote(recipe, str(run_dir))
    while not ray.wait([call], timeout=POLL_S)[0]:
        interrupted()
        console.stage("sft", last_progress(run_dir / PROGRESS))
    metrics = ray.get(call)
    console.say("sft finished: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    return target


def run_sft(recipe: Recipe, run_dir: str) -> dict[str, float]:
    """The body of the SFT task: everything it needs is in the recipe and the run's folder."""
    import torch

    from sse_rl.data.problems import load_splits
    from sse_rl.data.tokenizer import load_tokenizer
    from sse_rl.model import SSEForCausalLM
    from sse_rl.pipeline.sft import train_sft

    assert recipe.sft is not None
    if recipe.cluster.learner_threads is not None:
        torch.set_num_threads(recipe.cluster.learner_threads)
    folder = Path(run_dir)
    train, _ = load_splits(recipe.data)
    log = folder / PROGRESS
    log.unlink(missing_ok=True)

    def progress(step: int, metrics: dict[str, float]) -> None:
        with log.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    return train_sft(
        SSEForCausalLM.from_pretrained(folder / INIT),
        load_tokenizer(recipe.data),
        train,
        data=recipe.data,
        sft=recipe.sft,
        seed=recipe.seed,
        out=folder / SFT,
        progress=progress,
    )


def last_progress(path: Path) -> str:
    from sse_rl.report.sinks import read_rows

    rows = read_rows(path)
    return f"step {rows[-1]['step']}, loss {rows[-1].get('loss', 0):.4g}" if rows else "starting"
