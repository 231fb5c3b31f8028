"""The seed of each sample: stable, and the same for whoever asks for it again."""

from __future__ import annotations

import hashlib
import json


def sample_seed(seed: int, benchmark: str, problem_id: str, sample: int) -> int:
    """SHA-256 of the four values as JSON, cut to 31 bits (what every server takes as a seed).

    It knows neither the run, nor a path, nor how many samples there are: any sample can be drawn
    again alone.
    """
    text = json.dumps([seed, benchmark, problem_id, sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) & 0x7FFFFFFF
