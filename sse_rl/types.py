"""The nouns of the pipeline: what travels between engine, rewards, buffer and learner.

Arrays are numpy so that Ray ships them without a copy; torch appears on the two ends only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample, under vLLM's names and meanings."""

    n: int = 1
    """Completions of the prompt; its state is computed once and forked."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 keeps the whole vocabulary."""
    min_p: float = 0.0
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they stay in its token ids."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, besides the model's own end tokens."""
    ignore_eos: bool = False
    seed: int = 0
    seeds: tuple[int, ...] = ()
    """One for each of the n completions, in place of `seed`: each is then the one that a request of
    its own with that seed would get."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued `params.n` times."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(slots=True)
class Completion:
    """One finished sample of a request.

    Example: a prompt of P = 3 tokens continued by C = 2 fed the model 4 tokens, since the last one
    sampled was never fed: `routing` has P + C - 1 = 4 rows.
    """

    request_id: str
    index: int
    """Which of the request's n samples."""
    token_ids: np.ndarray
    """[C] int32, the end token included."""
    logprobs: np.ndarray
    """[C] float32, log_softmax(logits / temperature) before any truncation of the vocabulary."""
    routing: np.ndarray
    """[P + C - 1, L_sse, K] uint8, partitions chosen by each SSE layer for each token fed."""
    versions: np.ndarray
    """[C] int32, policy version that sampled each token."""
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it, None for the end token or the limit."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, rendered and tokenized."""

    id: str
    """Stable and unique in its dataset."""
    token_ids: tuple[int, ...]
    answer: str
    kind: str = "auto"
    """How the answer is compared: auto, aime or math."""
    text: str = ""
    """The rendered prompt, verbatim."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The dataset row's other columns, handed to reward functions."""


@dataclass(slots=True)
class Trajectory:
    """One answer to a prompt, with everything the learner needs."""

    token_ids: np.ndarray
    """[C] int32."""
    logprobs: np.ndarray
    """[C] float32, of the policy that sampled."""
    routing: np.ndarray
    """[P + C - 1, L_sse, K] uint8."""
    versions: np.ndarray
    """[C] int32."""
    finish_reason: FinishReason
    text: str = ""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """Each component's value; None where a component abstains."""
    statuses: dict[str, str] = field(default_factory=dict)
    """Each component's status, e.g. correct, no_box, timeout."""
    reward: float | None = None
    """Weighted sum of the components; None masks the sample."""


@dataclass(slots=True)
class Group:
    """G answers to one prompt: the unit that advantages are computed over."""

    id: int
    """Position in the prompt stream: unique in a run, the same after a resume."""
    prompt: Prompt
    trajectories: list[Trajectory]


@dataclass(slots=True)
class PackedBatch:
    """One micro-batch: whole trajectories end to end in one row of T tokens, without padding.

    A trajectory of P prompt tokens and C sampled ones takes P + C - 1 places, as its last token is
    never fed; the place of each token predicts the next, so C of its places carry a loss. Arrays
    over the M sampled tokens run in the order of the trajectories.

    Example: prompts (5, 6) and (7,) answered by (8, 9) and (4,)::

        input_ids        5 6 8 7
        cu_seqlens       0 3 4
        positions        0 1 2 0
        predicting         1 2 3
        targets            8 9 4
        sequence           0 0 1

    Where prompts are shared, each stands once, all of them before the answers, and an answer of C
    tokens takes C - 1 places: (5, 6) answered by (8, 9) and (4,)::

        input_ids        5 6 8
        cu_seqlens       0 2 3
        positions        0 1 2
        predicting         1 2 1
        targets            8 9 4
        parent               0
        readers          2 2 1
    """

    input_ids: np.ndarray
    """[T] int64."""
    cu_seqlens: np.ndarray
    """[B + 1] int64, where each trajectory begins, and T; or each prompt and each answer."""
    positions: np.ndarray
    """[T] int64, place of each token in its own trajectory."""
    routing: np.ndarray
    """[T, L_sse, K] uint8, the rollout's choices."""
    predicting: np.ndarray
    """[M] int64, the place whose next token is each target."""
    targets: np.ndarray
    """[M] int64, the sampled tokens."""
    sequence: np.ndarray
    """[M] int64, which of the B trajectories."""
    logprobs: np.ndarray
    """[M] float32, of the policy that sampled."""
    lengths: np.ndarray
    """[B] int64, sampled tokens of each trajectory; they sum to M."""
    advantages: np.ndarray
    """[B] float32."""
    scales: np.ndarray
    """[B] float32, what one token's loss counts for in the loss of the optimisation batch."""
    parent: np.ndarray | None = None
    """[A] int64, which prompt each answer of two tokens or more continues; None if trajectories
    are whole."""
    readers: np.ndarray | None = None
    """[T] int64, how many trajectories have each place; None if one each."""

    @property
    def num_tokens(self) -> int:
        """Of all its trajectories."""
        return len(self.input_ids) if self.readers is None else int(self.readers.sum())
