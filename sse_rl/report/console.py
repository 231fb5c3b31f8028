"""The live view of a run: a panel that redraws on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
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
    """Shows stages and steps as they come. Use as a context manager.

    Off a terminal it prints a line when its text has changed, at most one every `PLAIN_EVERY_S`,
    and the last step in any case.
    """

    def __init__(self, name: str, console: Console | None = None) -> None:
        self.name = name
        self.console = console or Console(highlight=False)
        self._history: dict[str, list[float]] = {label: [] for label in SHOWN}
        self._panel: Panel | None = None
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._last_line = ""
        self._printed_at = -math.inf

    def __enter__(self) -> RunConsole:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def stage(self, name: str, progress: str) -> None:
        """What is going on now, e.g. ("sft", "120/400 loss 0.31")."""
        if self.console.is_terminal:
            self._live.update(self._with_panel(Text(f"{self.name} · {name} {progress}")))
        else:
            self._line(f"{name} {progress}")

    def step(self, step: int, max_steps: int, metrics: Mapping[str, Any]) -> None:
        for label, key in SHOWN.items():
            value = metrics.get(key)
            self._history[label].append(math.nan if value is None else float(value))
        if self.console.is_terminal:
            self._panel = self._draw(step, max_steps)
            self._live.update(self._panel)
        else:
            values = "  ".join(
                f"{label} {row[-1]:.4g}"
                for label, row in self._history.items()
                if SHOWN[label] in metrics
            )
            self._line(f"grpo {step}/{max_steps}  {values}", last=step == max_steps)

    def _line(self, text: str, *, last: bool = False) -> None:
        due = time.monotonic() - self._printed_at > PLAIN_EVERY_S
        if text != self._last_line and (due or last):
            self._last_line, self._printed_at = text, time.monotonic()
            self.say(text)

    def _with_panel(self, text: Text) -> RenderableType:
        return Group(self._panel, text) if self._panel is not None else text

    def _draw(self, step: int, max_steps: int) -> Panel:
        table = Table.grid(padding=(0, 2))
        for label, row in self._history.items():
            table.add_row(label, f"{row[-1]:.4g}", Text(sparkline(row, width=48), style="cyan"))
        bar = ProgressBar(total=max_steps, completed=step, width=60)
        return Panel(
            Group(bar, table), title=f"{self.name} · grpo {step}/{max_steps}", expand=False
        )


def sparkline(values: Sequence[float], *, width: int) -> str:
    """The last `width` values as one line of bars, lowest to highest; a blank for NaN."""
    shown = values[-width:]
    known = [value for value in shown if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in shown
    )
