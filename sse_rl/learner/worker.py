"""The Ray actor around the learner: groups go in; metrics, weights and checkpoints come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sse_rl.pipeline.weights import WeightsIndex, pack
from sse_rl.recipe import Grpo
from sse_rl.types import Group

TRAINER_FILE = "trainer.pt"


class LearnerWorker:
    """Owns the model that learns. `model_path` is a folder that `from_pretrained` reads."""

    def __init__(
        self,
        model_path: str,
        grpo: Grpo,
        *,
        dtype: str,
        device: str,
        num_threads: int | None,
        seed: int,
        page_size: int,
        state_dtype: str,
    ) -> None:
        from sse_rl.learner.step import Learner
        from sse_rl.model import SSEForCausalLM

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        torch.manual_seed(seed)
        load = lambda: SSEForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).to(
            device
        )
        reference = load().eval().requires_grad_(False) if grpo.beta else None
        self.learner = Learner(
            load(),
            grpo,
            reference=reference,
            device=torch.device(device),
            page_size=page_size,
            state_dtype=getattr(torch, state_dtype),
        )
        self._snapshot: torch.Tensor | None = None

    def sees(self, path: str) -> bool:
        return Path(path).exists()

    def step(self, groups: list[Group]) -> dict[str, float]:
        return self.learner.step(groups)

    def weights(self, version: int) -> tuple[WeightsIndex, np.ndarray]:
        """A snapshot to publish; call with num_returns=2 so that the buffer stays in the store."""
        index, buffer = pack(self.learner.weights(), version=version, into=self._snapshot)
        self._snapshot = torch.from_numpy(buffer)  # the store takes a copy of its own
        return index, buffer

    def save(self, folder: str) -> None:
        """Write `model/` and the trainer's state into an existing folder."""
        self.save_model(str(Path(folder) / "model"))
        state = self.learner.state_dict()
        del state["model"]
        torch.save(state, Path(folder) / TRAINER_FILE)

    def save_model(self, folder: str) -> None:
        self.learner.model.save_pretrained(folder)

    def load(self, folder: str) -> None:
        from safetensors.torch import load_file

        state = torch.load(Path(folder) / TRAINER_FILE, map_location="cpu", weights_only=True)
        state["model"] = load_file(Path(folder) / "model" / "model.safetensors")
        self.learner.load_state_dict(state)
