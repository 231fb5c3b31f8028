"""A run from its recipe to its export: init or convert, distil, sft, base evaluation, grpo,
evaluation, export.

Each stage leaves something whole in the run's folder, and a resumed run skips what is there.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from sse_rl.data.problems import Problem, load_splits
from sse_rl.data.prompts import drop_long, refuse_long, render
from sse_rl.data.stream import PromptStream
from sse_rl.data.tokenizer import load_tokenizer
from sse_rl.errors import Interrupted, UserError
from sse_rl.pipeline import cluster
from sse_rl.pipeline.checkpoint import saved_steps, step_folder
from sse_rl.pipeline.controller import Controller, publish
from sse_rl.pipeline.evaluate import (
    PoolGenerator,
    Prompter,
    as_user_error,
    eos_token_ids,
    held_out,
    make_pool,
)
from sse_rl.pipeline.overlap import Beside, BetweenSteps, discard_after
from sse_rl.pipeline.rewards import RewardWorker, Scorer
from sse_rl.pipeline.rollouts import RolloutPool
from sse_rl.pipeline.source import GroupSource
from sse_rl.recipe import Grpo, Recipe
from sse_rl.recipe_io import first_difference, load_recipe, resolve
from sse_rl.report.console import RunConsole
from sse_rl.report.sinks import METRICS, Sinks, read_rows
from sse_rl.rollout.worker import EngineSpec

RECIPE, SUMMARY = "recipe.yaml", "summary.json"


def run(
    recipe: Recipe,
    *,
    runs_dir: Path,
    resume: str = "auto",
    address: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Run a recipe into `runs_dir/<name>` and return the summary that is written there too.

    resume: auto goes on with an unfinished run of the same recipe and returns a finished one's
    summary; never refuses a folder that exists; a number goes on from that checkpoint.
    Raises UserError for whatever is wrong with recipe, data, folder or cluster, before anything is
    written; SystemExit(143) after SIGTERM, with everything saved.
    """
    run_dir = (runs_dir / recipe.name).resolve()
    finished = check_folder(run_dir, recipe, resume)
    if finished is not None:
        return finished
    job = Job.prepare(recipe, run_dir)
    if dry_run:
        return job.plan()
    cluster.connect(address)
    cluster.preflight(recipe)
    # Ray installs handlers of its own when it starts: ours come after
    with RunConsole(recipe.name) as console, stop_signal() as interrupted:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / RECIPE).write_text(resolve(recipe))
        job.console, job.interrupted = console, interrupted
        began = time.monotonic()
        try:
            job.run(resume)
        except Interrupted:
            job.summarize("interrupted", time.monotonic() - began)
            console.say(f"stopped and saved; `--resume auto` goes on ({run_dir})")
            raise SystemExit(143) from None
        except BaseException:
            job.summarize("failed", time.monotonic() - began)
            raise
        finally:
            job.close()
        return job.summarize("finished", time.monotonic() - began)


def check_folder(run_dir: Path, recipe: Recipe, resume: str) -> dict[str, Any] | None:
    """The summary of a finished run of the same recipe, None if there is something to do.

    Raises UserError rather than touch a folder that holds another run.
    """
    if not (run_dir / RECIPE).exists():
        if run_dir.exists() and any(run_dir.iterdir()):
            raise UserError(f"{run_dir}: exists and is no run's folder; choose another name")
        if resume not in ("auto", "never"):
            raise UserError(f"--resume {resume}: there is no run in {run_dir}")
        return None
    if resume == "never":
        raise UserError(f"{run_dir}: this run exists already; change `name` or resume it")
    difference = first_difference(load_recipe(run_dir / RECIPE), recipe)
    if difference is not None:
        raise UserError(
            f"{run_dir}: holds a run of another recipe; first difference: {difference}. "
            "Change `name`, or remove the folder"
        )
    if resume != "auto" and not resume.isdigit():
        raise UserError(f"--resume {resume}: expected auto, never or the step of a checkpoint")
    summary = read_summary(run_dir)
    return summary if resume == "auto" and summary.get("status") == "finished" else None


def read_summary(run_dir: Path) -> dict[str, Any]:
    path = run_dir / SUMMARY
    return json.loads(path.read_text()) if path.exists() else {}


@dataclass(slots=True)
class Job:
    """One run: what it reads, the actors it started, and its stages in order."""

    recipe: Recipe
    run_dir: Path
    tokenizer: Any
    train: list[Problem]
    test: list[Problem]
    context: int
    console: RunConsole = field(default_factory=lambda: RunConsole("run"))
    interrupted: Callable[[], None] = lambda: None
    _close: list[Callable[[], None]] = field(default_factory=list)
    _earlier_s: float = 0.0
    """Seconds that former attempts at this run took."""

    @classmethod
    def prepare(cls, recipe: Recipe, run_dir: Path) -> Job:
        """Reads and checks everything that can be checked before a cluster is needed."""
        from sse_rl.pipeline.initial import context_length

        tokenizer = load_tokenizer(recipe.data)
        train, test = load_splits(recipe.data)
        context = context_length(recipe, len(tokenizer))
        longest = recipe.data.max_prompt_length + longest_answer(recipe)
        if longest > context:
            raise UserError(
                f"data.max_prompt_length {recipe.data.max_prompt_length} + the longest answer asked "
                f"for {longest_answer(recipe)} = {longest} tokens exceed the model's context of {context}"
            )
        earlier = read_summary(run_dir).get("wall_s", 0.0)
        return cls(recipe, run_dir, tokenizer, train, test, context, _earlier_s=earlier)

    def plan(self) -> dict[str, Any]:
        """What a run would do, for --dry-run."""
        grpo = self.recipe.grpo
        return {
            "name": self.recipe.name,
            "stages": self.stages(),
            "train_problems": len(self.train),
            "heldout_problems": len(self.test),
            "context": self.context,
            "steps": grpo.max_steps if grpo else 0,
            "answers_per_step": grpo.prompts_per_step * grpo.num_generations if grpo else 0,
        }

    def stages(self) -> list[str]:
        recipe = self.recipe
        present = {
            "distill": recipe.distill,
            "sft": recipe.sft,
            "grpo": recipe.grpo,
            "export": recipe.export.enabled or None,
        }
        first = "convert" if recipe.model.convert is not None else "init"
        return [first, *(name for name, section in present.items() if section is not None)]

    def run(self, resume: str) -> None:
        from sse_rl.pipeline.initial import distill, initialise, sft

        base = initialise(self.recipe, self.tokenizer, self.run_dir)
        if self.recipe.distill is not None:
            base = distill(self.recipe, self.run_dir, self.interrupted, self.console)
        if self.recipe.sft is not None:
            base = sft(self.recipe, self.run_dir, base, self.interrupted, self.console)
        if self.recipe.grpo is not None:
            self.grpo(self.recipe.grpo, base, resume)
        self.export(base)

    def grpo(self, grpo: Grpo, base: Path, resume: str) -> None:
        recipe, timeout_s = self.recipe, self.recipe.cluster.learner_timeout_s
        step = start_step(self.run_dir, resume)
        learner = self._spawn_learner(base, grpo)
        cluster.check_shared_folder(self.run_dir, learner, timeout_s=timeout_s)
        pool = self._spawn_pool(base, recipe.rollout.num_workers)
        prompts = drop_long(
            render(self.train, self.tokenizer, recipe.data), recipe.data.max_prompt_length
        )
        if len(prompts) < len(self.train):
            dropped = len(self.train) - len(prompts)
            self.console.say(
                f"{dropped} of {len(self.train)} prompts exceed data.max_prompt_length"
            )
        refuse_long(render(self.test, self.tokenizer, recipe.data), recipe.data.max_prompt_length)
        source = GroupSource(
            stream=PromptStream(prompts, recipe.seed),
            pool=pool,
            scorer=self._spawn_scorer(),
            decode=lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True),
            grpo=grpo,
            rollout=recipe.rollout,
            seed=recipe.seed,
            interrupted=self.interrupted,
        )
        sinks = Sinks(self.run_dir, keep=step)
        self._close.append(sinks.close)
        controller = Controller(
            recipe,
            self.run_dir,
            learner,
            pool,
            source,
            sinks,
            self.console,
            self._evaluations(base, pool, step),
            self.interrupted,
        )
        if step:
            controller.load(step)
        publish(learner, pool, version=step, timeout_s=timeout_s)
        controller.train(step)

    def _evaluations(self, base: Path, pool: RolloutPool, step: int) -> BetweenSteps | Beside:
        """The evaluations of a run that goes on after `step`."""
        discard_after(self.run_dir, step)
        options = self.recipe.eval
        if not options.num_workers:
            generator = self._generator(pool, self.interrupted)
            shown = self.console.stage
            return BetweenSteps(lambda step: self.evaluate(generator, step, shown), options.every)
        own = self._spawn_pool(base, options.num_workers)

        def evaluate(step: int, check: Callable[[], None]) -> dict[str, float]:
            scores = self.evaluate(self._generator(own, check), step, lambda *_: None)
            values = "  ".join(f"{name} {score:.4g}" for name, score in scores.items())
            self.console.say(f"evaluated step {step}: {values}")
            return scores

        beside = Beside(
            self.run_dir,
            every=options.every,
            trained=pool,
            pool=own,
            evaluate=evaluate,
            interrupted=self.interrupted,
        )
        self._close.append(beside.close)
        return beside

    def _generator(self, pool: RolloutPool, interrupted: Callable[[], None]) -> PoolGenerator:
        prompter = Prompter(self.tokenizer, self.recipe.data.system_prompt)
        return PoolGenerator(pool, prompter, self.context, interrupted)

    def evaluate(
        self, generator: PoolGenerator, step: int, shown: Callable[[str, str], None]
    ) -> dict[str, float]:
        """All evaluations of a step, into eval/; what they score, as metrics."""
        from sse_eval import evaluate, load_benchmark

        recipe, metrics = self.recipe, {}
        benchmarks = [held_out(self.test, recipe.data)] if self.test else []
        benchmarks += [as_user_error(load_benchmark, name) for name in recipe.eval.benchmarks]
        protocols = {"": (recipe.eval.num_samples, recipe.eval.temperature)}
        if recipe.eval.greedy:
            protocols["_greedy"] = (1, 0.0)
        for benchmark in benchmarks:
            for suffix, (samples, temperature) in protocols.items():
                name = benchmark.name + suffix
                summary = as_user_error(
                    evaluate,
                    benchmark,
                    generator,
                    self.run_dir / "eval" / f"{name}-{step}",
                    samples=samples,
                    temperature=temperature,
                    top_p=recipe.eval.top_p if temperature else 1.0,
                    max_tokens=answer_tokens(recipe),
                    seed=recipe.seed,
                    prompt="{problem}" if benchmark.source == "data" else braces(recipe),
                    model={"run": recipe.name, "step": step},
                    progress=lambda n, of, _, name=name: shown(
                        f"eval {name} at step {step}", f"{n}/{of}"
                    ),
                )
                metrics[f"eval/{name}"] = summary["avg"]
        return metrics

    def export(self, base: Path) -> None:
        if not self.recipe.export.enabled or (self.run_dir / "export").exists():
            return
        from sse_rl.export import export_model
        from sse_rl.model import SSEForCausalLM

        steps = saved_steps(self.run_dir)
        folder = step_folder(self.run_dir, steps[-1]) / "model" if steps else base
        model = SSEForCausalLM.from_pretrained(folder)
        export_model(model, self.tokenizer, self.run_dir / "export")

    def summarize(self, status: str, wall_s: float) -> dict[str, Any]:
        """Write summary.json, and the report where there is something to report."""
        from sse_rl.report.html import write_report

        rows = read_rows(self.run_dir / METRICS)
        export = self.run_dir / "export"
        summary = {
            "name": self.recipe.name,
            "status": status,
            "steps": rows[-1]["step"] if rows else 0,
            "wall_s": round(self._earlier_s + wall_s, 1),
            "eval": evaluations(self.run_dir, self.recipe),
            "throughput": throughput(rows),
            "export": str(export) if export.exists() else None,
        }
        beside = self.run_dir / (SUMMARY + ".partial")
        beside.write_text(json.dumps(summary, indent=1))
        os.replace(beside, self.run_dir / SUMMARY)
        write_report(self.run_dir)
        return summary

    def close(self) -> None:
        """Stop the actors, newest first."""
        while self._close:
            self._close.pop()()

    def _spawn_learner(self, base: Path, grpo: Grpo) -> Any:
        from sse_rl.learner.worker import LearnerWorker

        resources = self.recipe.cluster
        learner = (
            ray.remote(LearnerWorker)
            .options(
                num_cpus=resources.learner_cpus,
                num_gpus=resources.learner_gpus,
                runtime_env=cluster.KEEP_FREED_MEMORY,
            )
            .remote(
                str(base),
                grpo,
                dtype=self.recipe.model.dtype,
                device="cuda" if resources.learner_gpus else "cpu",
                num_threads=resources.learner_threads,
                seed=self.recipe.seed,
            )
        )
        self._close.append(lambda: ray.kill(learner))
        return learner

    def _spawn_pool(self, base: Path, num_workers: int) -> RolloutPool:
        config = json.loads((base / "config.json").read_text())
        recipe = self.recipe
        spec = EngineSpec(
            config=config,
            dtype=recipe.model.dtype,
            eos_token_ids=eos_token_ids(self.tokenizer),
            max_model_len=min(self.context, recipe.data.max_prompt_length + longest_answer(recipe)),
            rollout=recipe.rollout.model_copy(update={"num_workers": num_workers}),
            tokenizer=self.tokenizer if recipe.rollout.stop else None,
        )
        pool = make_pool(spec)
        self._close.append(pool.close)
        return pool

    def _spawn_scorer(self) -> Scorer:
        rewards, cpus = self.recipe.rewards, self.recipe.cluster.reward_cpus
        actor = ray.remote(RewardWorker).options(num_cpus=cpus)
        scorer = Scorer(lambda: actor.remote(rewards), timeout_s=2 * rewards.batch_timeout_s)
        self._close.append(scorer.close)
        return scorer


def start_step(run_dir: Path, resume: str) -> int:
    """The step to go on from: 0 without a checkpoint."""
    steps = saved_steps(run_dir)
    if resume.isdigit():
        if int(resume) not in steps and int(resume) != 0:
            raise UserError(f"--resume {resume}: {run_dir} has checkpoints of steps {steps}")
        return int(resume)
    return steps[-1] if steps else 0


def answer_tokens(recipe: Recipe) -> int:
    """Tokens that an evaluated answer may take."""
    if recipe.eval.max_tokens is not None:
        return recipe.eval.max_tokens
    return recipe.grpo.max_completion_length if recipe.grpo else 512


def longest_answer(recipe: Recipe) -> int:
    trained = recipe.grpo.max_completion_length if recipe.grpo else 0
    return max(trained, answer_tokens(recipe))


def braces(recipe: Recipe) -> str:
    """The prompt template as sse_eval writes it: `{problem}` is a placeholder, other braces text."""
    return recipe.data.prompt_template.replace("{{", "{").replace("}}", "}")


def evaluations(run_dir: Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """benchmark -> {base, tuned, gain, base_greedy, tuned_greedy, ...} of what has been evaluated."""
    last = recipe.grpo.max_steps if recipe.grpo else 0
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((run_dir / "eval").glob("*/summary.json")):
        name, _, step = path.parent.name.rpartition("-")
        when = {0: "base", last: "tuned"}.get(int(step))
        if when is None:
            continue
        summary = json.loads(path.read_text())
        benchmark, greedy = name.removesuffix("_greedy"), name.endswith("_greedy")
        entry = found.setdefault(benchmark, {})
        if greedy:
            entry[f"{when}_greedy"] = summary["avg"]
        else:
            entry |= {
                when: summary["avg"],
                f"{when}_interval": summary["ci_sampling"],
                f"{when}_boxed": summary["boxed"],
                "problems": summary["problems"],
                "samples": summary["samples"],
            }
    for entry in found.values():
        if None not in (entry.get("base"), entry.get("tuned")):
            entry["gain"] = entry["tuned"] - entry["base"]
    return found


def throughput(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps: seconds in rollout and learner, tokens learned from a second."""
    keys = ("perf/rollout_s", "perf/learn_s", "perf/tokens_per_s")
    return {
        key.removeprefix("perf/"): sum(row[key] for row in rows) / len(rows) for key in keys if rows
    }


@contextmanager
def stop_signal() -> Iterator[Callable[[], None]]:
    """A function that raises Interrupted once SIGTERM or Ctrl-C came; a second Ctrl-C stops at once."""
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Interrupted

    def handle(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
