"""How near converted layers come to attention: error of some layers after the same short alignment.

    python benchmarks/alignment.py --source SmolLM2-135M-Instruct --text gsm8k_train.jsonl

Each case starts from the same teacher, sees the same rows and reports, a layer, the squared error
of its output over the teacher's squared output on rows it was not trained on: 1 is a layer that
says nothing. Runs on a CPU in minutes; writes results/alignment-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from result_file import add_options, header, save
from torch import Tensor, nn

from sse_rl.data.corpus import PackedText, worked
from sse_rl.data.problems import load_problems
from sse_rl.data.tokenizer import named_tokenizer
from sse_rl.model import PackedInputs, SSEForCausalLM, packed_inputs
from sse_rl.model.convert import as_softmax, convert, load_teacher
from sse_rl.recipe import Convert, Data, Source

GATE = {"use_output_gate": True}
CASES: list[tuple[str, dict[str, Any], float]] = [
    ("GLA", {}, 1e-3),
    ("GLA", {}, 3e-3),
    ("GLA", {}, 1e-2),
    ("GLA, output gate", GATE, 3e-3),
    ("GLA, output gate", GATE, 1e-2),
    ("GLA, output gate, N = 8, K = 2", GATE | {"num_sparse_partition": 8, "num_writer": 2}, 3e-3),
    ("GLA, output gate, no short convolution", GATE | {"use_short_conv": False}, 3e-3),
    ("GDN, output gate", GATE | {"linear_attn_type": "gdn"}, 3e-3),
    ("GDN, output gate", GATE | {"linear_attn_type": "gdn"}, 1e-2),
]
"""Name, keys of `Convert`, peak learning rate."""
HELD_OUT = 6
"""Rows that are measured on."""


class Example(NamedTuple):
    seqs: PackedInputs
    layers: dict[int, tuple[Tensor, Tensor]]
    """layer -> its normalised input [T, d], its attention's output [T, d]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--text", required=True, help="problems with solutions, JSONL")
    parser.add_argument("--layers", default="3,8,16,24")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cases", help="numbers, e.g. 0,2; default all")
    parser.add_argument("--device", default="cpu")
    add_options(parser)
    options = parser.parse_args()
    layers = [int(layer) for layer in options.layers.split(",")]
    origin = load_teacher(options.source)
    examples = read(options, layers, as_softmax(origin, options.source).to(options.device))
    others = [i for i in range(origin.config.num_hidden_layers) if i not in layers]
    rows: list[dict[str, Any]] = []
    numbers = [int(n) for n in options.cases.split(",")] if options.cases else range(len(CASES))
    for name, keys, rate in (CASES[n] for n in numbers):
        began = time.monotonic()
        wanted = Convert(source=options.source, attention_layers=others, **keys)
        student = convert(origin, wanted).to(options.device)
        errors = {i: align(student, i, examples, options.epochs, rate) for i in layers}
        rows.append({"case": name, "learning_rate": rate, "errors": errors})
        rows[-1]["seconds"] = round(time.monotonic() - began)
        print(json.dumps(rows[-1]), flush=True)
        write(options, rows)


@torch.no_grad()
def read(options: argparse.Namespace, layers: list[int], teacher: SSEForCausalLM) -> list[Example]:
    """What the teacher's layers read and said on the first rows of the text."""
    source = Source(path=options.text, solution_remove="<<.*?>>", limit=10 * options.rows)
    data = Data(tokenizer=options.source, train=source)
    documents = worked(load_problems(source), named_tokenizer(options.source, None), data)
    text = PackedText(documents, max_length=options.length, seed=0)
    examples = []
    for rows in text.in_order(options.rows * options.length):
        seqs, kept = packed_inputs(rows.lengths, device=options.device), {}
        x = teacher.model.embeddings(torch.from_numpy(rows.tokens).to(options.device))
        blocks: Any = teacher.model.layers
        for i, layer in enumerate(blocks[: max(layers) + 1]):
            normed = layer.attn_norm(x)
            mixed = layer.attn(normed, seqs)
            x = x + mixed
            x = x + layer.mlp(layer.mlp_norm(x))
            if i in layers:
                kept[i] = (normed, mixed)
        examples.append(Example(seqs, kept))
    return examples


def align(
    student: SSEForCausalLM, layer: int, examples: list[Example], epochs: int, rate: float
) -> list[float]:
    """The held-out error of a layer, before and after each epoch, one row a step."""
    layers: Any = student.model.layers
    mixer = layers[layer].attn
    adamw = torch.optim.AdamW(mixer.parameters(), lr=rate, weight_decay=0.0)
    trained, held_out = examples[HELD_OUT:], examples[:HELD_OUT]
    steps = epochs * len(trained)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda k: min(1, (k + 1) / 5) * 0.5 * (1 + math.cos(math.pi * k / steps))
    )

    def error(example: Example) -> Tensor:
        x, wanted = example.layers[layer]
        return F.mse_loss(mixer(x, example.seqs)[0], wanted) / wanted.square().mean()

    @torch.no_grad()
    def measured() -> float:
        return round(sum(float(error(example)) for example in held_out) / len(held_out), 4)

    errors = [measured()]
    for _ in range(epochs):
        for example in trained:
            error(example).backward()
            nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
            adamw.step()
            schedule.step()
            adamw.zero_grad()
        errors.append(measured())
    return errors


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    command = (
        "python benchmarks/alignment.py --source SmolLM2-135M-Instruct --text gsm8k_train.jsonl"
    )
    result = {
        "name": "alignment",
        **header(options.device, command, options.commit),
        "tokens": options.epochs * (options.rows - HELD_OUT) * options.length,
        "rows": rows,
    }
    save(result, options.out, "alignment")


if __name__ == "__main__":
    main()
