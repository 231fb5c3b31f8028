"""Result files: what was found, on which device, with which versions, at which commit."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--commit", help="what was measured (default: git's HEAD)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")


def header(device: str, command: str, commit: str | None, *, triton: bool = True) -> dict[str, Any]:
    """What a reader needs to judge the numbers. "cuda" is told by the GPU's name, another device as
    given; the commit is git's HEAD if None; Triton's version, if wanted, is None without a GPU."""
    import torch  # here: who only draws does not wait for it

    cuda = device == "cuda"
    versions: dict[str, str | None] = {"torch": torch.__version__}
    if triton:
        versions["triton"] = __import__("triton").__version__ if cuda else None
    return {
        "device": torch.cuda.get_device_name() if cuda else device,
        **versions,
        "commit": commit or _head(),
        "date": date.today().isoformat(),
        "command": command,
    }


def save(result: dict[str, Any], out: Path, name: str, suffix: str | None = None) -> None:
    """Write <out>/<name>-<suffix>.json, the suffix the result's device if not given."""
    suffix = suffix or re.sub(r"[^a-z0-9]+", "-", result["device"].lower())
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{suffix}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def _head() -> str:
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
