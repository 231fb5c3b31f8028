"""What the engine works on: a `Job` is a request's prompt, a `Sequence` one of its samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sse_rl.types import Request

if TYPE_CHECKING:
    from torch import Tensor

    from sse_rl.rollout.arrival import Arrival


@dataclass(slots=True, eq=False)
class Job:
    """A request inside the engine: the prompt is fed once, its state is kept until n samples began.

    Example: n = 4 with room for 3 samples. The prompt keeps its slot while the first three run; the
    fourth, placed when one of them ends, takes over the prompt's own slot and pages.
    """

    request: Request
    limit: int
    """Tokens a sample may have: `max_tokens`, or less where the model's length ends it before."""
    slot: int = 0
    pages: list[int] = field(default_factory=list)
    """Slot and pages of the prompt; 0 and none while it waits."""
    kept: bool = False
    """The job owns its slot and pages; its last sample takes them over."""
    prefilled: int = 0
    placed: int = 0
    """Samples that have a slot and pages, running and finished ones included."""
    samples: list[Sequence] = field(default_factory=list)
    """Those placed and not finished, in order of their index."""
    routing: list[tuple[Arrival, slice]] = field(default_factory=list)
    """[P, L_sse, K] uint8, in pieces as prefilled: each some rows of what a call fed."""
    logits: Tensor | None = None
    """[1, V] fp32 of the prompt's last token, once it is prefilled."""
    version: int = 0
    """Policy version that computed `logits`."""

    @property
    def length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def ready(self) -> bool:
        """The whole prompt is in the cache, or is fed in this step."""
        return self.prefilled == self.length

    @property
    def pending(self) -> int:
        """Samples that have no slot yet."""
        return self.request.params.n - self.placed


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a job, with the slot and the pages of its whole life."""

    job: Job
    index: int
    slot: int
    pages: list[int]
    """Prompt pages first; the full ones are shared with the job's other samples."""
    inherits: bool
    """It continues in the prompt's own slot and pages, so that nothing is copied."""
