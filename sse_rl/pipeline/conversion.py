"""`sse-rl convert`: a softmax Transformer in, a folder with an SSE-H and its tokenizer out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sse_rl.data.corpus import PackedText
from sse_rl.data.tokenizer import named_tokenizer
from sse_rl.errors import UserError
from sse_rl.model.convert import as_softmax, convert, load_teacher, teacher_config
from sse_rl.pipeline.checkpoint import atomic_folder
from sse_rl.pipeline.distill import perplexity
from sse_rl.recipe_io import parse_convert

ROW, MEASURED = 512, 8192
"""Tokens of a row at most, and of all that perplexity is measured on."""


def convert_checkpoint(
    source: str,
    out: Path,
    *,
    attention_layers: str | None = None,
    overrides: Sequence[str] = (),
    chat_template: Path | None = None,
    text: Path | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Convert `source` into folder `out`, which appears whole or not at all; what to tell the user.

    `attention_layers` as on the command line; with `text`, the perplexity of teacher and result on
    the first tokens of that file are among what is told.

    Raises:
        UserError: a bad option, model or tokenizer; `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists already, choose another folder")
    layers = _layers(attention_layers, teacher_config(source).num_hidden_layers)
    keys: dict[str, Any] = (
        {"source": source} if layers is None else {"source": source, "attention_layers": layers}
    )
    options = parse_convert(keys, overrides)
    template = None if chat_template is None else str(chat_template)
    tokenizer = named_tokenizer(source, template)
    held_out, said = (None, "") if text is None else _read(text, tokenizer)
    teacher = load_teacher(source)
    student = convert(teacher, options, seed=seed)
    with atomic_folder(out) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    report = {
        "attention layers": ", ".join(map(str, student.config.attention_layers)) or "none",
        "SSE layers": str(len(student.config.sse_layers)),
        "parameters": f"{student.num_parameters() / 1e6:.1f} M",
    }
    if held_out is not None:
        report["measured on"] = said
        for name, model in (("teacher", as_softmax(teacher, source)), ("converted", student)):
            report[f"{name} perplexity"] = f"{perplexity(model, held_out, MEASURED):.4g}"
    return report | {"written to": str(out)}


def _layers(given: str | None, layers: int) -> int | list[int] | None:
    if given is None:
        return None
    if given == "all":
        return list(range(layers))
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise UserError(f"--attention-layers {given}: expected a count, a list such as 3,7, or all")
    return [int(part) for part in parts] if "," in given else int(given)


def _read(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[PackedText, str]:
    """The text in rows of equal length, and how much of it is measured."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot be read: {error}") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise UserError(f"--text {path}: {len(ids)} tokens, nothing to measure on")
    length = len(ids) // -(-len(ids) // ROW)
    measured = min(len(ids), MEASURED) // length * length
    said = f"{measured:,} of {len(ids):,} tokens, in rows of {length}"
    return PackedText([np.array(ids)], max_length=length, seed=0), said
