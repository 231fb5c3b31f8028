"""`sse-rl eval`: a checkpoint or a served model measured by sse_eval's protocol."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from sse_eval import Benchmark, Generator, Summary, evaluate, load_benchmark, prompt_template
from sse_eval.benchmarks import HUB
from sse_eval.endpoint import Endpoint
from sse_eval.folder import check_config
from sse_eval.runner import config_of, requests_of
from sse_eval.types import Message

from sse_rl.data.tokenizer import end_token_ids
from sse_rl.errors import UserError
from sse_rl.pipeline import cluster
from sse_rl.pipeline.evaluate import (
    PoolGenerator,
    Prompter,
    as_user_error,
    load_policy,
    make_pool,
    model_folder,
)
from sse_rl.pipeline.folder import RECIPE
from sse_rl.pipeline.interrupt import stop_signal
from sse_rl.pipeline.weights import pack
from sse_rl.recipe import Cluster, Rollout
from sse_rl.recipe_io import load_recipe
from sse_rl.rollout.worker import EngineSpec

_PLACES = ("checkpoints", "model")
"""Of a run, and of a checkpoint; they tell nothing of which."""
WEIGHTS = frozenset({"model.weights_crc32"})
"""What a folder's configuration has that is known only once the weights are loaded."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is asked: two evaluations that share it can be compared."""

    benchmarks: tuple[str, ...]
    """Names or JSONL files."""
    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int = 0
    prompt: str = "default"
    """default, matharena, or a text with `{problem}`."""
    limit: int | None = None
    """The first problems of each benchmark only."""


class Plan(NamedTuple):
    """What one benchmark would ask for, as `--dry-run` shows it."""

    benchmark: str
    problems: int
    samples: int
    """Of all problems together."""
    longest_prompt: int | None
    """Tokens; None where the tokenizer is a server's."""
    context: int | None
    """Tokens of prompt and answer together; None if a server does not say."""
    prompt: str
    """The first problem as the model would read it."""
    out: str


class Opened(NamedTuple):
    """A model that is ready to answer."""

    generator: Generator
    identity: dict[str, Any]
    """What tells its weights from others'."""
    gpus: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, an export or a run, answered for by engines on Ray."""

    model: str
    address: str = "auto"
    workers: int | None = None
    max_num_seqs: int = 256
    chat_template: bool = True
    dtype: str = "auto"
    """What the engines compute in: float32, bfloat16 or float16; auto is the checkpoint's own."""
    placement_timeout_s: float = Cluster().placement_timeout_s
    """How long others may use what the engines need."""

    @cached_property
    def run(self) -> Path | None:
        """The run that the model is of."""
        path = Path(self.model).resolve()
        return next((x for x in (path, *path.parents[:3]) if (x / RECIPE).is_file()), None)

    @cached_property
    def name(self) -> str:
        """The folder's, behind its run's within a run: `mine-export`, `mine-step-40`."""
        path = Path(self.model).resolve()
        if self.run is not None:
            within = path.relative_to(self.run).parts
            return "-".join([self.run.name, *(x for x in within if x not in _PLACES)])
        return f"{path.parent.name}-{path.name}" if path.name in ("export", "model") else path.name

    @property
    def trained_prompt(self) -> str | None:
        """What the run asked its problems in, if that is of `{problem}` alone."""
        with suppress(UserError, LookupError, AttributeError):
            if self.run is not None:
                data = load_recipe(self.run / RECIPE).data
                return data.prompt_template.format(problem="{problem}")
        return None

    @cached_property
    def folder(self) -> Path:
        return model_folder(self.model)

    @property
    def identity(self) -> dict[str, Any]:
        """What is known of it before its weights are loaded."""
        return {"name": self.name}

    def check(self) -> None:
        """Raises UserError unless there is a model; reads no weights."""
        _ = self.folder

    @cached_property
    def prompter(self) -> Prompter:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return Prompter(tokenizer, chat_template=self.chat_template)

    @cached_property
    def context(self) -> int:
        from sse_rl.model import SSEConfig

        return SSEConfig.from_pretrained(self.folder).max_position_embeddings

    def render(self, messages: Sequence[Message]) -> str:
        return self.prompter.render(messages)

    def tokens(self, prompt: str) -> int | None:
        return len(self.prompter.token_ids(prompt))

    @contextmanager
    def open(self, longest: int) -> Iterator[Opened]:
        """Engines with room for `longest` tokens of prompt and answer.

        Raises UserError if the cluster has no room for them; SIGTERM and Ctrl-C raise Interrupted.
        """
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        policy = load_policy(self.folder, dtype)
        index, buffer = pack(policy.state_dict(), version=0)
        crc = zlib.crc32(memoryview(buffer))  # pyright: ignore[reportArgumentType]
        cluster.connect(self.address)
        rollout = rollout_of(self.workers, self.max_num_seqs)
        with stop_signal() as interrupted:
            cluster.await_room(
                {
                    "CPU": rollout.num_workers * rollout.num_cpus_per_worker,
                    "GPU": rollout.num_workers * rollout.num_gpus_per_worker,
                },
                self.placement_timeout_s,
                f"--workers {rollout.num_workers}",
                interrupted=interrupted,
            )
            pool = make_pool(
                EngineSpec(
                    config=policy.config.to_dict(),
                    dtype=str(policy.dtype).removeprefix("torch."),
                    eos_token_ids=end_token_ids(self.prompter.tokenizer),
                    max_model_len=longest,
                    rollout=rollout,
                )
            )
            try:
                pool.set_weights(index, ray.put(buffer))
                yield Opened(
                    PoolGenerator(pool, self.prompter, self.context, interrupted),
                    self.identity | {"weights_crc32": f"{crc:08x}"},
                    round(rollout.num_workers * rollout.num_gpus_per_worker),
                )
            finally:
                pool.close()


@dataclass(frozen=True)
class Served:
    """A model behind an OpenAI-compatible address."""

    url: str
    model: str | None = None
    """Its name there; None takes the only one served."""
    workers: int = 16
    """Requests at a time."""

    @cached_property
    def endpoint(self) -> Endpoint:
        return as_user_error(Endpoint, self.url, self.model, concurrency=self.workers)

    @cached_property
    def name(self) -> str:
        return self.endpoint.model.replace("/", "--")

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.endpoint.model, "endpoint": self.endpoint.url}

    def check(self) -> None:
        """Raises UserError unless the server answers and has the model."""
        _ = self.endpoint

    @cached_property
    def context(self) -> int | None:
        return self.endpoint.max_context

    def render(self, messages: Sequence[Message]) -> str:
        return self.endpoint.render(messages)

    def tokens(self, prompt: str) -> int | None:
        return None

    @contextmanager
    def open(self, longest: int) -> Iterator[Opened]:
        yield Opened(self.endpoint, self.identity, 0)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model, what it is asked, and where the answers go: `out`/<benchmark>/."""

    target: Checkpoint | Served
    protocol: Protocol
    out: Path | None = None
    """None is evals/<name of the model>."""
    benchmarks: list[Benchmark] = field(init=False)

    def __post_init__(self) -> None:
        """Raises UserError for a model that is not there, and for no benchmark, one that cannot be
        read or one that is there twice."""
        names, limit = self.protocol.benchmarks, self.protocol.limit
        if not names:
            raise UserError(f"--benchmark: give one or more of {', '.join(HUB)}, FILE.jsonl")
        self.target.check()  # before benchmarks are fetched
        loaded = [as_user_error(load_benchmark, name, limit=limit) for name in names]
        if len({bench.name for bench in loaded}) < len(loaded):
            raise UserError(f"--benchmark {','.join(names)}: one of them is there twice")
        object.__setattr__(self, "benchmarks", loaded)

    def plans(self) -> list[Plan]:
        """What would be asked, with nothing started.

        Raises UserError for a model that cannot be read, for a context that is too short, and for
        a folder that holds another evaluation.
        """
        found = [self._plan(bench) for bench in self.benchmarks]
        context, max_tokens = self.target.context, self.protocol.max_tokens
        longest = max(plan.longest_prompt or 1 for plan in found)
        if context is not None and longest + max_tokens > context:
            raise UserError(
                f"--max-tokens {max_tokens}: with the longest prompt, {longest} tokens, it exceeds "
                f"the context of {self.target.name}, {context} tokens"
                + (f"; at most {context - longest} fit" if longest < context else "")
            )
        return found

    def remarks(self) -> list[str]:
        """What tells that a score may not mean what it seems to."""
        trained = self.target.trained_prompt if isinstance(self.target, Checkpoint) else None
        asked = {self._sampling(bench)["prompt"] for bench in self.benchmarks}
        if trained is None or asked == {trained}:
            return []
        return [
            f"{self.target.name} was trained with the prompt {trained!r} and is asked with "
            f"{' and '.join(map(repr, sorted(asked)))}: --prompt '{trained}' asks as in training"
        ]

    def run(self, progress: Callable[[str, int, int], None]) -> dict[str, Summary]:
        """Ask, grade, write; resumes where it stopped. progress: (benchmark, finished, wanted).

        Raises UserError as `plans` does, before anything is started or written; Interrupted after
        SIGTERM or Ctrl-C, with every finished answer in its folder.
        """
        prompts = [plan.longest_prompt or 1 for plan in self.plans()]
        with self.target.open(max(prompts) + self.protocol.max_tokens) as model:
            return {bench.name: self._run(bench, model, progress) for bench in self.benchmarks}

    def _plan(self, bench: Benchmark) -> Plan:
        sampling = self._sampling(bench)
        requests = requests_of(bench, **sampling | {"samples": 1})  # pyright: ignore[reportArgumentType]
        prompts = {request.id: self.target.render(request.messages) for request in requests}
        prompt = sampling.pop("prompt")
        config = config_of(bench, sampling, prompt, prompts, self.target.identity)
        as_user_error(check_config, self._folder(bench), config, unknown=WEIGHTS)
        counted = [n for n in map(self.target.tokens, prompts.values()) if n is not None]
        return Plan(
            benchmark=bench.name,
            problems=len(requests),
            samples=len(requests) * self.protocol.samples,
            longest_prompt=max(counted, default=None),
            context=self.target.context,
            prompt=prompts[requests[0].id],
            out=str(self._folder(bench)),
        )

    def _run(self, bench: Benchmark, model: Opened, progress: Callable) -> Summary:
        return as_user_error(
            evaluate,
            bench,
            model.generator,
            self._folder(bench),
            **self._sampling(bench),
            model=model.identity,
            gpus=model.gpus,
            progress=lambda done, wanted, _: progress(bench.name, done, wanted),
        )

    @property
    def root(self) -> Path:
        """The folder of all benchmarks' folders."""
        return self.out or Path("evals") / self.target.name

    @property
    def folders(self) -> dict[str, Path]:
        """Each benchmark's, by its name."""
        return {bench.name: self._folder(bench) for bench in self.benchmarks}

    def _folder(self, bench: Benchmark) -> Path:
        return self.root / bench.name

    def _sampling(self, bench: Benchmark) -> dict[str, Any]:
        protocol = self.protocol
        return {
            "samples": protocol.samples,
            "temperature": protocol.temperature,
            "top_p": protocol.top_p,
            "max_tokens": protocol.max_tokens,
            "seed": protocol.seed,
            "prompt": as_user_error(prompt_template, protocol.prompt, bench.name),
        }


def rollout_of(workers: int | None, max_num_seqs: int) -> Rollout:
    """`workers` engines on the cluster; None is one a GPU or, without any, one a node.

    Raises UserError if there is no room for them: Ray would wait for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        workers = workers or gpus
        if workers > gpus:
            raise UserError(f"--workers {workers}: the cluster has {gpus} GPUs, one a worker")
        return Rollout(num_workers=workers, num_gpus_per_worker=1.0, max_num_seqs=max_num_seqs)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    workers = workers or max(1, len(cpus))
    if workers > sum(cpus):
        raise UserError(f"--workers {workers}: the cluster has {sum(cpus)} CPUs, one a worker")
    threads = max(n for n in range(1, max(cpus) + 1) if sum(c // n for c in cpus) >= workers)
    return Rollout(
        num_workers=workers,
        num_cpus_per_worker=float(threads),
        num_threads=threads,
        max_num_seqs=max_num_seqs,
    )


def evaluation_folders(path: Path) -> list[Path]:
    """The evaluations of a folder: itself, or all in it or in its `eval/`.

    Raises UserError if there is none.
    """
    if _is_evaluation(path):
        return [path]
    root = path / "eval" if (path / "eval").is_dir() else path
    found = sorted(filter(_is_evaluation, root.glob("*")))
    if not found:
        raise UserError(f"{path}: no evaluation there, nor a folder of them")
    return found


def evaluations_in(path: Path) -> dict[str, Path]:
    """The evaluations of a folder by name, of those of a run the last of each benchmark.

    Raises UserError if there is none.
    """
    folders = evaluation_folders(path)
    if folders == [path]:
        return {path.name: path}
    found: dict[str, tuple[int, Path]] = {}
    for folder in folders:
        name, _, step = folder.name.rpartition("-")
        name, number = (name, int(step)) if name and step.isdigit() else (folder.name, -1)
        found[name] = max(found.get(name, (-2, folder)), (number, folder))
    return {name: folder for name, (_, folder) in found.items()}


def pairs(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """The evaluations of two folders that belong together, by name.

    Raises UserError if there are none.
    """
    old, new = evaluations_in(before), evaluations_in(after)
    if len(old) == len(new) == 1:
        return [(*old.values(), *new.values())]  # pyright: ignore[reportReturnType]
    common = [name for name in old if name in new]
    if not common:
        raise UserError(
            f"{before} has evaluations of {', '.join(old)}, {after} of {', '.join(new)}: "
            "no common name"
        )
    return [(old[name], new[name]) for name in common]


def _is_evaluation(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "results.jsonl").is_file()
