"""An evaluation that survives kills, says how sure it is, and can be read in ten seconds."""

from sse_eval.benchmarks import load_benchmark
from sse_eval.folder import EvaluationError
from sse_eval.prompts import PROMPT, prompt_template
from sse_eval.runner import evaluate, regrade, requests_of, summarize
from sse_eval.seeds import sample_seed
from sse_eval.types import (
    Benchmark,
    Generator,
    Problem,
    SampleOutput,
    SampleRequest,
    Summary,
)

__all__ = [
    "PROMPT",
    "Benchmark",
    "EvaluationError",
    "Generator",
    "Problem",
    "SampleOutput",
    "SampleRequest",
    "Summary",
    "evaluate",
    "load_benchmark",
    "prompt_template",
    "regrade",
    "requests_of",
    "sample_seed",
    "summarize",
]
