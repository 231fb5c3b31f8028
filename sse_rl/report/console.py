"""The live view of a run: a panel that redraws on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
SHOWN = {
    "reward": "reward",
    "accuracy": "rewards/accuracy",
    "length": "completion_length/mean",
    "entropy": "entropy",
    "KL rollout/learner": "rollout_kl",
    "flip rate": "flip_rate",
    "grad norm": "grad_norm",
    "tokens/s": "perf/tokens_per_s",
}
PLAIN_EVERY_S = 5.0


class RunConsole:
    """Shows stages and steps as they come. Use as a context manager."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.console = Console(highlight=False)
        self._history: dict[str, list[float]] = {label: [] for label in SHOWN}
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._last_line = 0.0

    def __enter__(self) -> RunConsole:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def stage(self, name: str, progress: str) -> None:
        """What is going on now, e.g. ("sft", "120/400 loss 0.31")."""
        if self.console.is_terminal:
            self._live.update(Text(f"{self.name} · {name} {progress}"))
        elif time.monotonic() - self._last_line > PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"{name} {progress}")

    def step(self, step: int, max_steps: int, metrics: Mapping[str, Any]) -> None:
        for label, key in SHOWN.items():
            self._history[label].append(float(metrics.get(key) or 0.0))
        if self.console.is_terminal:
            self._live.update(self._panel(step, max_steps))
        elif time.monotonic() - self._last_line > PLAIN_EVERY_S or step == max_steps:
            self._last_line = time.monotonic()
            values = "  ".join(f"{label} {row[-1]:.4g}" for label, row in self._history.items())
            self.say(f"grpo {step}/{max_steps}  {values}")

    def _panel(self, step: int, max_steps: int) -> Panel:
        table = Table.grid(padding=(0, 2))
        for label, row in self._history.items():
            table.add_row(label, f"{row[-1]:.4g}", Text(sparkline(row, width=48), style="cyan"))
        bar = ProgressBar(total=max_steps, completed=step, width=60)
        return Panel(
            Group(bar, table), title=f"{self.name} · grpo {step}/{max_steps}", expand=False
        )


def sparkline(values: list[float], *, width: int) -> str:
    """The last `width` values as one line of bars, lowest to highest."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)
