"""Where the policy comes from: a fresh model, a checkpoint, or a Transformer that is converted and
distilled; then the cold start."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import ray

from sse_rl.errors import Interrupted, UserError
from sse_rl.pipeline import cluster
from sse_rl.pipeline.checkpoint import atomic_folder
from sse_rl.recipe import Recipe
from sse_rl.report.console import RunConsole

INIT, DISTILL, SFT = "init", "distill", "sft"
PERPLEXITY = "perplexity.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
POLL_S = 1.0
STOP_S = 60.0
"""For a stage's last step and its state, once a run is asked to stop."""


def initialise(recipe: Recipe, tokenizer: Any, run_dir: Path) -> Path:
    """The folder of the model that the run starts from, written once."""
    target = run_dir / INIT
    if target.exists():
        return target
    import torch

    from sse_rl.model import SSEConfig, SSEForCausalLM
    from sse_rl.pipeline.evaluate import load_policy, model_folder

    if recipe.model.convert is not None:
        from sse_rl.model.convert import convert, load_teacher

        teacher = load_teacher(recipe.model.convert.source)
        model = convert(teacher, recipe.model.convert, seed=recipe.seed)
    elif recipe.model.path is not None:
        model = load_policy(model_folder(recipe.model.path))
    else:
        torch.manual_seed(recipe.seed if recipe.model.seed is None else recipe.model.seed)
        keys: dict[str, Any] = special_ids(tokenizer) | model_keys(recipe, len(tokenizer))
        model = SSEForCausalLM(SSEConfig(**keys))
    if recipe.model.convert is None:  # what is trained on first stays in float32
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


def context_length(recipe: Recipe, tokenizer: Any) -> int:
    """The model's context in tokens, from its config alone. Raises UserError for a bad config, or
    if the model was not made for the tokenizer's ids."""
    from sse_rl.model import SSEConfig
    from sse_rl.pipeline.evaluate import model_folder

    vocab_size = len(tokenizer)
    if recipe.model.convert is not None:
        from sse_rl.model.convert import converted_config, teacher_config

        options = recipe.model.convert
        config = converted_config(teacher_config(options.source), options)
        if vocab_size > config.vocab_size:
            raise UserError(
                f"data.tokenizer = {recipe.data.tokenizer} has {vocab_size} ids, more than the "
                f"{config.vocab_size} of {options.source}: name the teacher's tokenizer"
            )
        return config.max_position_embeddings
    folder = None if recipe.model.path is None else model_folder(recipe.model.path)
    try:
        if folder is None:
            config = SSEConfig(**model_keys(recipe, vocab_size))
        else:
            config = SSEConfig.from_pretrained(folder)
    except (ValueError, TypeError) as error:
        key = "model.config" if folder is None else f"model.path = {recipe.model.path}"
        raise UserError(f"{key}: {error}") from None
    if folder is not None:
        _check_tokenizer(recipe, tokenizer, folder, config.vocab_size)
    return config.max_position_embeddings


def _check_tokenizer(recipe: Recipe, tokenizer: Any, folder: Path, vocab_size: int) -> None:
    """Raises UserError unless the tokenizer's ids mean to the model in `folder` what it learned."""
    named = f"data.tokenizer = {recipe.data.tokenizer}"
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    advice = f"set data.tokenizer: {folder}" if own else "name the tokenizer that it was trained on"
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{named} has {len(tokenizer)} ids, more than the {vocab_size} of model.path = "
            f"{recipe.model.path}: {advice}"
        )
    if not own:
        return
    from transformers import AutoTokenizer

    try:
        words = AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {reason}") from None
    if words != tokenizer.get_vocab():
        raise UserError(
            f"{named} has {len(tokenizer)} ids and is not the tokenizer in {folder}, {len(words)} "
            f"ids, which model.path = {recipe.model.path} was trained on: {advice}"
        )


class StageWorker:
    """The Ray actor that the stages before GRPO run in, one after the other.

    It imports at once what they need, and a stage finds the kernels that the last one compiled.
    """

    def __init__(self, stages: Sequence[str]) -> None:
        for stage in stages:
            import_module(f"sse_rl.pipeline.{stage}")

    def run(
        self,
        body: Callable[[Recipe, str, str], dict[str, float]],
        recipe: Recipe,
        run_dir: str,
        base: str,
    ) -> dict[str, float]:
        import torch

        try:
            return body(recipe, run_dir, base)
        finally:
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def stage_worker(recipe: Recipe, run_dir: Path) -> Iterator[Any]:
    """A `StageWorker` on the learner's resources, so that it starts while the model is initialised;
    None if no stage is left for it."""
    sections = {DISTILL: recipe.distill, SFT: recipe.sft}
    stages = [
        stage
        for stage, options in sections.items()
        if options is not None and not (run_dir / stage).exists()
    ]
    if not stages:
        yield None
        return
    worker = cluster.on_learner(StageWorker, recipe.cluster).remote(stages)
    try:
        yield worker
    finally:
        ray.kill(worker)


def distill(
    worker: Any,
    recipe: Recipe,
    run_dir: Path,
    interrupted: Callable[[], None],
    console: RunConsole,
) -> Path:
    """Distil the converted model in a `stage_worker`; returns the folder of the result."""
    _in_process(worker, run_distill, DISTILL, recipe, run_dir, INIT, interrupted, console)
    measured = json.loads((run_dir / DISTILL / PERPLEXITY).read_text())
    for model, texts in measured.items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in texts.items())
        console.say(f"perplexity, {model}: {shown}")
    return run_dir / DISTILL


def sft(
    worker: Any,
    recipe: Recipe,
    run_dir: Path,
    base: Path,
    interrupted: Callable[[], None],
    console: RunConsole,
) -> Path:
    """Run the cold start from `base` in a `stage_worker`; returns the folder of the result."""
    _in_process(worker, run_sft, SFT, recipe, run_dir, base.name, interrupted, console)
    return run_dir / SFT


def _in_process(
    worker: Any,
    body: Callable[[Recipe, str, str], dict[str, float]],
    stage: str,
    recipe: Recipe,
    run_dir: Path,
    base: str,
    interrupted: Callable[[], None],
    console: RunConsole,
) -> None:
    """Runs a stage's `body` in `worker`, unless its folder is there already.

    If the run is interrupted, the file `<stage>.stop` asks the stage to save its state and end.
    """
    if (run_dir / stage).exists():
        return
    stop = stop_file(run_dir, stage)
    stop.unlink(missing_ok=True)
    call = worker.run.remote(body, recipe, str(run_dir), base)
    while not ray.wait([call], timeout=POLL_S)[0]:
        try:
            interrupted()
        except Interrupted:
            stop.touch()
            ray.wait([call], timeout=STOP_S)
            stop.unlink(missing_ok=True)
            raise
        console.stage(stage, last_progress(run_dir / f"{stage}.jsonl"))
    metrics = cluster.get(call, f"the {stage} task")
    console.say(f"{stage} finished: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def stop_file(run_dir: Path, stage: str) -> Path:
    return run_dir / f"{stage}.stop"


def run_sft(recipe: Recipe, run_dir: str, base: str) -> dict[str, float]:
    """The body of the SFT task: everything it needs is in the recipe and the run's folder."""
    from sse_rl.data.problems import load_splits
    from sse_rl.data.tokenizer import load_tokenizer
    from sse_rl.pipeline.evaluate import load_policy
    from sse_rl.pipeline.sft import train_sft

    assert recipe.sft is not None
    folder = Path(run_dir)
    train, _ = load_splits(recipe.data)
    return train_sft(
        load_policy(folder / base),
        load_tokenizer(recipe.data),
        train,
        data=recipe.data,
        sft=recipe.sft,
        seed=recipe.seed if recipe.sft.seed is None else recipe.sft.seed,
        out=folder / SFT,
        progress=_start(recipe, folder / f"{SFT}.jsonl"),
        stopped=stop_file(folder, SFT).exists,
    )


def run_distill(recipe: Recipe, run_dir: str, base: str) -> dict[str, float]:
    """The body of the distillation task, as `run_sft`."""
    from sse_rl.data.tokenizer import load_tokenizer
    from sse_rl.model.convert import as_softmax, load_teacher
    from sse_rl.pipeline.distill import distill as train
    from sse_rl.pipeline.distill_text import held_out_text, training_text
    from sse_rl.pipeline.evaluate import load_policy

    options, origin = recipe.distill, recipe.model.convert
    assert options is not None and origin is not None
    folder = Path(run_dir)
    progress = _start(recipe, folder / f"{DISTILL}.jsonl")
    device = "cuda" if recipe.cluster.learner_gpus else "cpu"
    tokenizer = load_tokenizer(recipe.data)
    held_out = held_out_text(recipe, tokenizer)  # a fault there costs none of the teacher's answers
    teacher = as_softmax(load_teacher(origin.source), origin.source).to(device)  # pyright: ignore[reportArgumentType]
    student = load_policy(folder / base).float().to(device)  # pyright: ignore[reportArgumentType]
    text = training_text(recipe, tokenizer, teacher, folder, progress)
    state = folder / f"{DISTILL}.state"
    measured = train(
        student,
        teacher,
        text,
        held_out,
        options=options,
        seed=recipe.seed,
        state=state,
        progress=progress,
        stopped=stop_file(folder, DISTILL).exists,
    )
    with atomic_folder(folder / DISTILL) as target:
        student.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / PERPLEXITY).write_text(json.dumps(measured, indent=1))
    shutil.rmtree(state, ignore_errors=True)
    return {"rows": float(len(text))} | measured["distilled"]


def _start(recipe: Recipe, log: Path) -> Callable[[int, dict[str, float]], None]:
    """Prepares a task's process; what its stage reports goes into `log`, in place of what an
    interrupted attempt reported of the same steps."""
    import torch

    from sse_rl.report.sinks import read_rows

    if recipe.cluster.learner_threads is not None:
        torch.set_num_threads(recipe.cluster.learner_threads)
    rows = read_rows(log)

    def progress(step: int, metrics: dict[str, float]) -> None:
        if rows:
            kept = (json.dumps(row) + "\n" for row in rows if row["step"] < step)
            log.write_text("".join(kept))
            rows.clear()
        with log.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    return progress


def last_progress(path: Path) -> str:
    from sse_rl.report.sinks import read_rows

    rows = read_rows(path)
    if not rows:
        return "starting"
    last = {name: rows[-1][name] for name in ("step", "loss", "answers") if name in rows[-1]}
    return ", ".join(f"{name} {value:.4g}" for name, value in last.items())
