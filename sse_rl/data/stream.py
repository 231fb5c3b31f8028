"""The order in which prompts are dealt, as a function of the seed and a position alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sse_rl.errors import UserError
from sse_rl.types import Prompt


class PromptStream:
    """Endless epochs over `prompts`, each in a fresh order drawn from (seed, epoch).

    Example: with 3 prompts, positions 0..2 deal each of them once and position 3 opens epoch 1.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise UserError("no prompts to train on")
        self._prompts = prompts
        self._seed = seed
        self._position = 0
        self._epoch = -1
        self._order: np.ndarray = np.empty(0, dtype=np.int64)

    def next(self, n: int) -> list[tuple[int, Prompt]]:
        """The next n prompts, each with its position in the stream: the group's id."""
        dealt = [
            (position, self[position]) for position in range(self._position, self._position + n)
        ]
        self._position += n
        return dealt

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position, "seed": self._seed, "prompts": len(self._prompts)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`.

        Raises:
            UserError: it is of another seed or another number of prompts.
        """
        for key, ours in (("seed", self._seed), ("prompts", len(self._prompts))):
            if state[key] != ours:
                raise UserError(
                    f"the checkpoint's prompt stream has {key} = {state[key]}, this run has {ours}"
                )
        self._position = state["position"]

    def __getitem__(self, position: int) -> Prompt:
        """The prompt dealt at a position, past or future."""
        epoch, place = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
        return self._prompts[self._order[place]]
