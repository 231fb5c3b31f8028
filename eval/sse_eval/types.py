"""The nouns of an evaluation: a problem, a sample asked for, a sample answered, the summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

Message = Mapping[str, str]
"""A chat message, `{"role": ..., "content": ...}`."""

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Problem:
    id: str
    """Unique in its benchmark."""
    problem: str
    answer: str
    kind: str = "auto"
    """How answers are compared: auto, aime or math."""
    exam: str = ""
    """The part of the benchmark that it belongs to, e.g. I or II of an AIME; empty if none."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    name: str
    problems: tuple[Problem, ...]
    source: str
    """The hub id, or the file's name without its folder."""
    revision: str
    """Commit of the hub's data set; empty for a file."""
    sha256: str
    """Of the file's bytes, or of the hub's rows written as JSON lines."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sample wanted of one problem."""

    id: str
    """The problem's id."""
    sample: int
    """0 .. samples-1."""
    messages: tuple[Message, ...]
    seed: int
    """In 0 .. 2**31-1; a function of (seed, benchmark, id, sample) alone."""
    temperature: float
    """0 is greedy."""
    top_p: float
    max_tokens: int
    """New tokens; only these and the model's end tokens stop a sample."""
    budgets: tuple[int, ...] = ()
    """Smaller token limits at which `SampleOutput.cuts` is welcome."""


@dataclass(slots=True)
class SampleOutput:
    """One finished sample.

    Example: of a completion of 5,000 tokens, asked for with budgets (4096, 8192), the first 4,096
    tokens decode to 11,873 characters: `cuts == {4096: 11873}`.
    """

    id: str
    sample: int
    completion: str
    """The answer alone, without the prompt."""
    tokens: int
    """New tokens, the end token included."""
    finish_reason: FinishReason
    """abort: the sample is thrown away and stays missing until the next run."""
    prompt: str
    """What the model read, verbatim."""
    cuts: Mapping[int, int] = field(default_factory=dict)
    """Budget -> characters of the completion within it, for budgets below `tokens`. Without it an
    answer longer than a budget counts as wrong at that budget."""
    seconds: float | None = None
    """Time the sample took, for timings.jsonl."""


class Generator(Protocol):
    """Whatever answers prompts: Ray workers, an endpoint, a fake in a test."""

    @property
    def max_context(self) -> int | None:
        """Longest prompt and answer together, in tokens; None if unknown."""
        ...

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as the model will read it."""
        ...

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[SampleOutput]:
        """Yield each sample as it finishes, in any order; requests come longest first.

        Raises before the first sample if a prompt and its max_tokens exceed the context.
        """
        ...


class Summary(TypedDict):
    """What summary.json holds. Scores and rates are 0..1; an interval is [low, high] at 95 %."""

    benchmark: str
    problems: int
    """Problems of the benchmark."""
    samples: int
    """Samples wanted of each problem."""
    finished: int
    """Samples there are, over all problems."""
    missing: int
    """Samples there are not: reported, never counted as wrong."""
    avg: float | None
    """avg@k: mean over problems of the share of right samples; None while there are none."""
    ci_sampling: list[float] | None
    """The same problems asked again; None with less than two samples of a problem."""
    ci_bootstrap: list[float] | None
    """Other problems of the same kind; None with less than two problems."""
    pass_at: dict[str, float]
    """k -> unbiased pass@k."""
    maj: float | None
    """Score of the majority answer, ties split."""
    lenient_avg: float | None
    """avg when an answer outside a box counts too."""
    boxed: float | None
    """Rate of samples with an answer in a box."""
    no_box: float | None
    truncated: float | None
    """Rate of samples stopped by max_tokens."""
    unfinished: float | None
    """Rate of samples that never left their thinking."""
    timeouts: float | None
    """Rate of samples whose check ran into the grader's time limit."""
    statuses: dict[str, int]
    tokens: dict[str, Any]
    """{all, right, wrong} -> {count, mean, median, p95, total}."""
    exams: dict[str, dict[str, Any]]
    """exam -> {problems, avg}; empty without exams."""
    lengths: list[dict[str, Any]]
    """Buckets of answer length: {low, high, samples, avg}."""
    budgets: list[dict[str, Any]]
    """Accuracy had max_tokens been less: {tokens, avg}."""
    suspects: list[dict[str, Any]]
    """Samples scored 0 that deserve a look: {id, sample, why, extracted, answer}."""
    model: dict[str, Any]
    config: dict[str, Any]
    perf: dict[str, Any]
    """What depends on the clock: {wall_s, tokens_per_s, gpu_hours}."""
