"""The report of an evaluation, as HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sse_eval.folder import Row, replace
from sse_eval.types import Problem, Summary


def write_report(
    folder: Path, summary: Summary, problems: Sequence[Problem], rows: Sequence[Row]
) -> None:
    """Write report.html and report.md into an evaluation's folder."""
    replace(folder / "report.md", markdown(summary).encode())


def markdown(summary: Summary) -> str:
    """The summary in a few lines of Markdown."""
    return f"# {summary['benchmark']}\n"
