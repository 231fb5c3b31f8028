"""A run from its recipe to its export: init or convert, distil, sft, base evaluation, grpo,
evaluation, export.

Each stage leaves something whole in the run's folder, and a resumed run skips what is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from sse_rl.data.problems import load_splits
from sse_rl.data.prompts import drop_long, refuse_long, render
from sse_rl.data.stream import PromptStream
from sse_rl.data.tokenizer import end_token_ids, load_tokenizer
from sse_rl.errors import Interrupted, UserError
from sse_rl.pipeline import cluster, difficulty
from sse_rl.pipeline.benchmarks import RunBenchmark, answer_tokens, run_benchmarks
from sse_rl.pipeline.best import BEST
from sse_rl.pipeline.checkpoint import saved_steps, step_folder
from sse_rl.pipeline.controller import Controller, publish
from sse_rl.pipeline.evaluate import (
    PoolGenerator,
    Prompter,
    as_user_error,
    make_pool,
)
from sse_rl.pipeline.folder import (
    EVAL,
    EXPORT,
    changed,
    check_folder,
    claim,
    cut_back,
    read_summary,
    start_step,
)
from sse_rl.pipeline.interrupt import stop_signal
from sse_rl.pipeline.overlap import Beside, BetweenSteps
from sse_rl.pipeline.rewards import RewardWorker, Scorer, check_components
from sse_rl.pipeline.rollouts import RolloutPool
from sse_rl.pipeline.source import GroupSource
from sse_rl.pipeline.summary import summarize
from sse_rl.recipe import Grpo, Recipe
from sse_rl.report.console import RunConsole
from sse_rl.report.sinks import Sinks
from sse_rl.rollout.worker import EngineSpec
from sse_rl.types import Prompt


def run(
    recipe: Recipe,
    *,
    runs_dir: Path,
    resume: str = "auto",
    address: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Run a recipe into `runs_dir/<name>` and return the summary that is written there too.

    resume: auto goes on with an unfinished run of the same recipe, but for `folder.RESUMABLE`, and
    returns a finished one's summary; never refuses a folder that exists; a number goes on from that
    checkpoint.

    Raises UserError for whatever is wrong with recipe, data, folder or cluster, before anything is
    written; RunError if a part of the run dies or fails; SystemExit(143) after SIGTERM, with
    everything saved.
    """
    run_dir = (runs_dir / recipe.name).resolve()
    finished = check_folder(run_dir, recipe, resume)
    if finished is not None:
        return finished
    start = start_step(run_dir, resume)
    job = Job.prepare(recipe, run_dir)
    if dry_run:
        return job.plan()
    changes = changed(run_dir, recipe)
    cluster.connect(address)
    cluster.preflight(recipe)
    with (
        claim(run_dir, recipe),
        RunConsole(recipe.name) as console,
        stop_signal() as interrupted,
    ):
        for change in changes:
            console.say(f"resumed with {change}")
        began, before = time.monotonic(), read_summary(run_dir)

        def summed_up(status: str, error: BaseException | None = None) -> dict[str, Any]:
            seconds = time.monotonic() - began
            return summarize(
                recipe,
                run_dir,
                status,
                before=before,
                start=start,
                seconds=seconds,
                stages=job.spent,
                error=error,
            )

        job.console, job.interrupted = console, interrupted
        job.progressed = lambda: summed_up("running")

        try:
            with job.actors:
                job.run(start)
        except Interrupted:
            summed_up("interrupted")
            console.say(f"stopped and saved; `--resume auto` goes on ({run_dir})")
            raise SystemExit(143) from None
        except BaseException as error:
            with suppress(OSError, ValueError, UserError):  # the first error is the one to show
                summed_up("failed", error)
            raise
        return summed_up("finished")


@dataclass(slots=True)
class Job:
    """One run: what it reads, the actors it started, and its stages in order."""

    recipe: Recipe
    run_dir: Path
    tokenizer: Any
    prompts: list[Prompt]
    """What GRPO trains on, those too long left out."""
    dropped: int
    """Prompts left out."""
    benchmarks: list[RunBenchmark]
    context: int
    """Tokens that the model may read."""
    max_model_len: int
    """Tokens of the longest prompt and its answer that the run asks for."""
    reward_sources: dict[str, bytes]
    """Files of reward functions, as they were checked."""
    console: RunConsole = field(default_factory=lambda: RunConsole("run"))
    interrupted: Callable[[], None] = lambda: None
    progressed: Callable[[], object] = lambda: None
    """Called after each stage, and after evaluations between steps: if the run is killed, what it
    took until then is known."""
    actors: ExitStack = field(default_factory=ExitStack)
    """Ends what the run started, newest first."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds in each stage, and in evaluations between steps."""

    @classmethod
    def prepare(cls, recipe: Recipe, run_dir: Path) -> Job:
        """Reads and checks everything that can be checked before a cluster is needed."""
        from sse_rl.pipeline.initial import context_length
        from sse_rl.pipeline.texts import check_texts

        reward_sources = check_components(recipe.rewards.components)
        if recipe.grpo is not None:
            difficulty.check(recipe.grpo.difficulty)
        tokenizer = load_tokenizer(recipe.data)
        train, test = load_splits(recipe.data)
        context = context_length(recipe, tokenizer)
        limit = recipe.data.max_prompt_length
        every = render(train, tokenizer, recipe.data)
        prompts = drop_long(every, limit)
        refuse_long(render(test, tokenizer, recipe.data), limit)
        benchmarks = run_benchmarks(recipe, test, tokenizer)
        trained = recipe.grpo.max_completion_length if recipe.grpo else 0
        longest = limit + max(trained, answer_tokens(recipe))
        longest = max([longest, *(benchmark.longest for benchmark in benchmarks)])
        if longest > context:
            raise UserError(
                f"a prompt of data.max_prompt_length = {limit}, or a benchmark's, with its answer "
                f"may "
                f"take {longest} tokens, more than the model's context of {context}: lower "
                "eval.max_tokens or grpo.max_completion_length"
            )
        check_texts(recipe, tokenizer, train, test, run_dir)
        pages = -(-longest // recipe.rollout.page_size)
        if recipe.rollout.num_pages is not None and recipe.rollout.num_pages <= pages + 1:
            raise UserError(
                f"rollout.num_pages = {recipe.rollout.num_pages}: a prompt and its answer may "
                f"take {longest} tokens, so at least {pages + 2} pages are needed"
            )
        return cls(
            recipe,
            run_dir,
            tokenizer,
            prompts,
            len(every) - len(prompts),
            benchmarks,
            context,
            longest,
            reward_sources,
        )

    def plan(self) -> dict[str, Any]:
        """What a run would do, for --dry-run."""
        grpo = self.recipe.grpo
        return {
            "name": self.recipe.name,
            "stages": self.stages(),
            "train_problems": len(self.prompts),
            "train_problems_too_long": self.dropped,
            "benchmarks": {b.benchmark.name: len(b.benchmark.problems) for b in self.benchmarks},
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

    def run(self, start: int) -> None:
        """All stages, GRPO from step `start` on."""
        from sse_rl.pipeline.initial import distill, initialise, sft, stage_worker

        if self.recipe.grpo is not None:
            cut_back(self.run_dir, start, max_steps=self.recipe.grpo.max_steps)
        with stage_worker(self.recipe, self.run_dir) as worker:
            shown = self.interrupted, self.console
            with self._timed(self.stages()[0]):
                base = initialise(self.recipe, self.tokenizer, self.run_dir)
            if self.recipe.distill is not None:
                with self._timed("distill"):
                    base = distill(worker, self.recipe, self.run_dir, *shown)
            if self.recipe.sft is not None:
                with self._timed("sft"):
                    base = sft(worker, self.recipe, self.run_dir, base, *shown)
        if self.recipe.grpo is not None:
            self.grpo(self.recipe.grpo, base, start)
        with self._timed("export"):
            self.export(base)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[stage] = self.spent.get(stage, 0.0) + time.monotonic() - began
        self.progressed()

    def grpo(self, grpo: Grpo, base: Path, start: int) -> None:
        recipe, timeout_s = self.recipe, self.recipe.cluster.learner_timeout_s
        learner = self._spawn_learner(base, grpo)
        pool = self._spawn_pool(base, recipe.rollout.num_workers)
        scorer = self._spawn_scorer()
        cluster.check_shared_folder(self.run_dir, learner, timeout_s=timeout_s)
        if self.dropped:
            self.console.say(f"{self.dropped} prompts exceed data.max_prompt_length: left out")
        if grpo.difficulty is not None and not start:
            publish(learner, pool, version=0, timeout_s=timeout_s)
        with self._timed("difficulty"):
            prompts = self._worth_asking(grpo, pool, scorer, may_ask=not start)
        source = GroupSource(
            stream=PromptStream(prompts, recipe.seed),
            pool=pool,
            scorer=scorer,
            decode=self._decode,
            grpo=grpo,
            rollout=recipe.rollout,
            seed=recipe.seed,
            interrupted=self.interrupted,
        )
        sinks = Sinks(self.run_dir, keep=start)
        self.actors.callback(sinks.close)
        controller = Controller(
            recipe,
            self.run_dir,
            self.tokenizer,
            learner,
            pool,
            source,
            sinks,
            self.console,
            self._evaluations(base, pool),
            self.interrupted,
        )
        if start:
            controller.load(start)
        publish(learner, pool, version=start, timeout_s=timeout_s)
        controller.train(start)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _worth_asking(
        self, grpo: Grpo, pool: RolloutPool, scorer: Scorer, *, may_ask: bool
    ) -> list[Prompt]:
        """The training prompts that `grpo.difficulty` leaves."""
        if grpo.difficulty is None:
            return self.prompts
        measurement = difficulty.Measurement(
            pool,
            scorer,
            self._decode,
            grpo,
            self.recipe.rollout,
            self.recipe.seed,
            self.interrupted,
            lambda progress: self.console.stage("difficulty", progress),
            self.console.say,
        )
        path = self.run_dir / difficulty.FILE
        kept = measurement.worth_asking(self.prompts, grpo.difficulty, path, may_ask=may_ask)
        rates = difficulty.told(difficulty.read_rates(path))
        self.console.say(f"difficulty {rates}; {len(kept)} prompts are trained on")
        return kept

    def _evaluations(self, base: Path, pool: RolloutPool) -> BetweenSteps | Beside:
        options = self.recipe.eval
        if not options.num_workers:
            generator = self._generator(pool, self.interrupted)

            def between(step: int) -> dict[str, float]:
                with self._timed("eval"):
                    return self.evaluate(generator, step, self.console.stage)

            return BetweenSteps(between, options.every)
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
        self.actors.callback(beside.close)
        return beside

    def _generator(self, pool: RolloutPool, interrupted: Callable[[], None]) -> PoolGenerator:
        recipe = self.recipe
        return PoolGenerator(
            pool,
            Prompter(self.tokenizer, recipe.data.system_prompt),
            self.max_model_len,
            interrupted,
            stop=tuple(recipe.rollout.stop),
            stop_token_ids=tuple(recipe.rollout.stop_token_ids),
        )

    def evaluate(
        self, generator: PoolGenerator, step: int, shown: Callable[[str, str], None]
    ) -> dict[str, float]:
        """All evaluations of a step, into eval/; what they score, as metrics."""
        from sse_eval import evaluate

        recipe, metrics = self.recipe, {}
        protocols = {"": (recipe.eval.num_samples, recipe.eval.temperature)}
        if recipe.eval.greedy:
            protocols["_greedy"] = (1, 0.0)
        for benchmark, prompt, _ in self.benchmarks:
            for suffix, (samples, temperature) in protocols.items():
                name = benchmark.name + suffix
                summary = as_user_error(
                    evaluate,
                    benchmark,
                    generator,
                    self.run_dir / EVAL / f"{name}-{step}",
                    samples=samples,
                    temperature=temperature,
                    top_p=recipe.eval.top_p if temperature else 1.0,
                    max_tokens=answer_tokens(recipe),
                    seed=recipe.seed,
                    prompt=prompt,
                    model={"run": recipe.name, "step": step},
                    progress=lambda n, of, _, name=name: shown(
                        f"eval {name} at step {step}", f"{n}/{of}"
                    ),
                )
                metrics[f"eval/{name}"] = summary["avg"]
        return metrics

    def export(self, base: Path) -> None:
        if not self.recipe.export.enabled or (self.run_dir / EXPORT).exists():
            return
        from sse_rl.export import export_model
        from sse_rl.pipeline.evaluate import load_policy

        steps = saved_steps(self.run_dir)
        best = self.run_dir / BEST / "model"
        folder = step_folder(self.run_dir, steps[-1]) / "model" if steps else base
        model = load_policy(best if self.recipe.checkpoint.best and best.exists() else folder)
        export_model(model, self.tokenizer, self.run_dir / EXPORT)

    def _spawn_learner(self, base: Path, grpo: Grpo) -> Any:
        from sse_rl.learner.worker import LearnerWorker

        resources = self.recipe.cluster
        learner = cluster.on_learner(LearnerWorker, resources).remote(
            str(base),
            grpo,
            dtype=self.recipe.model.dtype,
            device="cuda" if resources.learner_gpus else "cpu",
            num_threads=resources.learner_threads,
            seed=self.recipe.seed,
            page_size=self.recipe.rollout.page_size,
            state_dtype=self.recipe.rollout.state_dtype,
        )
        self.actors.callback(ray.kill, learner)
        return learner

    def _spawn_pool(self, base: Path, num_workers: int) -> RolloutPool:
        config = json.loads((base / "config.json").read_text())
        recipe = self.recipe
        spec = EngineSpec(
            config=config,
            dtype=recipe.model.dtype,
            eos_token_ids=end_token_ids(self.tokenizer),
            max_model_len=self.max_model_len,
            rollout=recipe.rollout.model_copy(update={"num_workers": num_workers}),
            tokenizer=self.tokenizer if recipe.rollout.stop else None,
        )
        pool = make_pool(spec)
        self.actors.callback(pool.close)
        return pool

    def _spawn_scorer(self) -> Scorer:
        rewards, cpus = self.recipe.rewards, self.recipe.cluster.reward_cpus
        actor = ray.remote(RewardWorker).options(num_cpus=cpus)
        spawn = lambda: actor.remote(rewards, self.reward_sources)
        scorer = Scorer(spawn, timeout_s=2 * rewards.batch_timeout_s)
        self.actors.callback(scorer.close)
        return scorer
