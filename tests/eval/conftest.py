"""A model in 20 lines: what it answers depends on the request alone, as with a real seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from sse_eval import Benchmark, SampleOutput, SampleRequest, load_benchmark
from sse_rewards import RewardPool

GOLDS = ("204", "25", "371", "7", "60", "113")


class FakeModel:
    """Answers in an order of its own; stops with an exception after `dies_after` samples."""

    max_context: int | None = 4096

    def __init__(
        self, golds: Mapping[str, str], *, order: int = 0, dies_after: int = 10**9
    ) -> None:
        self.golds, self.order, self.dies_after = golds, order, dies_after
        self.asked: list[SampleRequest] = []

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"<|{m['role']}|>{m['content']}" for m in messages) + "<|assistant|>"

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[SampleOutput]:
        self.asked = list(requests)
        shuffled = random.Random(self.order).sample(self.asked, len(self.asked))
        for number, request in enumerate(shuffled):
            if number == self.dies_after:
                raise ConnectionError("the worker died")
            yield self.answer(request)

    def answer(self, request: SampleRequest) -> SampleOutput:
        draw = random.Random(request.seed)
        right, tokens = draw.random() < 0.6, draw.randint(3, 100)
        box = rf"\boxed{{{self.golds[request.id] if right else draw.randint(0, 9)}}}"
        return SampleOutput(
            id=request.id,
            sample=request.sample,
            completion="so " * tokens + (box if draw.random() < 0.9 else "never mind"),
            tokens=tokens,
            finish_reason="stop",
            prompt=self.render(request.messages),
        )


@pytest.fixture
def fake_model() -> type[FakeModel]:
    return FakeModel


@pytest.fixture
def benchmark_file(tmp_path: Path) -> Path:
    rows = [
        {
            "id": f"2031-{'I' * (1 + i % 2)}-{i}",
            "problem": f"Find $x_{i}$." + " Hm." * i,
            "answer": g,
        }
        for i, g in enumerate(GOLDS)
    ]
    file = tmp_path / "aime31.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def problems(benchmark_file: Path) -> Benchmark:
    return load_benchmark(benchmark_file)


@pytest.fixture
def golds(problems: Benchmark) -> dict[str, str]:
    return {problem.id: problem.answer for problem in problems.problems}


@pytest.fixture(scope="session")
def pool() -> Iterator[RewardPool]:
    with RewardPool(workers=1) as pool:
        yield pool
