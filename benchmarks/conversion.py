"""What each choice of a conversion costs: perplexities after equal, short distillations.

    python benchmarks/conversion.py --source SmolLM2 --train gsm8k_train.jsonl \
        --held-out gsm8k_test.jsonl            # writes results/conversion-<device>.json

First all layers are converted and aligned; then attention is put back layer by layer, each time
where that brings the model nearest to its teacher (divergence of the logits, nats a token). This
is the order in which layers should be kept. Then each case is converted and distilled on the same
rows, in the same order, from the same seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from result_file import add_options, header, save

from sse_rl.data.corpus import PackedText, Rows, worked
from sse_rl.data.problems import load_problems
from sse_rl.data.tokenizer import named_tokenizer
from sse_rl.model import SSEForCausalLM, packed_inputs
from sse_rl.model.convert import as_softmax, convert, kept_layers, load_teacher
from sse_rl.model.mixer import SSEMixer
from sse_rl.pipeline.distill import Perplexities, distill
from sse_rl.recipe import Convert, Data, Distill, Source

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "8 that help most": ({}, {}),
    "8 layers, evenly spread": ({"attention_layers": 8}, {}),
    "the first and 7 evenly spread": ({"attention_layers": "1 and 7"}, {}),
    "15 that help most": ({"attention_layers": "15"}, {}),
    "8, teacher trained first": ({}, {"teacher_steps": 40}),
    "8, no output gate": ({"use_output_gate": False}, {}),
    "8, distilled at 3e-4": ({}, {"learning_rate": 3e-4}),
    "8, aligned at 3e-3": ({}, {"align_learning_rate": 3e-3}),
    "8, aligned at 3e-2": ({}, {"align_learning_rate": 3e-2}),
    "8, not aligned": ({}, {"align_steps": 0}),
    "8, the text's cross-entropy alone": ({}, {"kl_coef": 0.0, "lm_coef": 1.0}),
    "8, GLA": ({"linear_attn_type": "gla"}, {}),
    "8, N = 8, K = 2": ({"num_sparse_partition": 8, "num_writer": 2}, {}),
    "8, no short convolution": ({"use_short_conv": False}, {}),
}
"""Name -> keys of `Convert` and of `Distill` that differ from `CONVERTED` and `DISTILLED`; the 8
layers that help most are kept if not said."""
CONVERTED: dict[str, Any] = {"linear_attn_type": "gdn", "use_output_gate": True}
DISTILLED: dict[str, Any] = {"align_learning_rate": 1e-2, "learning_rate": 1e-3, "lm_coef": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--train", required=True, help="problems with solutions, JSONL")
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", help="numbers, e.g. 0,2; '' for none; default all")
    parser.add_argument("--ranked", help="layers, the one to keep first, where the order is known")
    parser.add_argument("--keep", type=int, default=15, help="layers to put in order")
    parser.add_argument("--align-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--kl-tokens", type=int, default=8192)
    add_options(parser)
    options = parser.parse_args()
    began = time.monotonic()
    bench = Bench(options)
    rows: list[dict[str, Any]] = []
    order: list[dict[str, Any]] = []
    if options.ranked:
        ranked = [int(layer) for layer in options.ranked.split(",")]
    else:
        order = bench.order(options.keep)
        ranked = [found["layer"] for found in order[1:]]
        write(options, rows, order)
    wanted = (
        [int(n) for n in options.cases.split(",") if n]
        if options.cases is not None
        else range(len(CASES))
    )
    for name, (converted, distilled) in (list(CASES.items())[n] for n in wanted):
        converted = converted | {"attention_layers": kept(converted, ranked, bench.layers)}
        rows.append(
            {"case": name, "at": round(time.monotonic() - began)} | bench.run(converted, distilled)
        )
        print(json.dumps(rows[-1]), flush=True)
        write(options, rows, order)


def kept(converted: dict[str, Any], ranked: list[int], layers: int) -> int | list[int]:
    """The layers that a case keeps, `ranked` from the one that helps most on."""
    wanted = converted.get("attention_layers", "8")
    if isinstance(wanted, int):
        return wanted
    count, _, spread = wanted.partition(" and ")
    return sorted({*ranked[: int(count)], *kept_layers(int(spread or 0), layers)})


class Bench:
    """A teacher, the text, and what is measured on held-out rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        tokenizer = named_tokenizer(options.source, None)
        self.origin = load_teacher(options.source)
        self.teacher = as_softmax(self.origin, options.source).to(options.device)
        self.layers = self.origin.config.num_hidden_layers

        def text(path: str) -> PackedText:
            source = Source(path=path, solution_remove="<<.*?>>")
            data = Data(tokenizer=options.source, train=source)
            documents = worked(load_problems(source), tokenizer, data)
            return PackedText(documents, max_length=options.length, seed=0)

        self.text, self.held_out = text(options.train), text(options.held_out)
        self.reference = [self.hidden(self.teacher, rows) for rows in self.measured()]

    def run(self, converted: dict[str, Any], distilled: dict[str, Any]) -> dict[str, Any]:
        """One case: its settings, perplexities on the way, divergence at the end, and the time."""
        began = time.monotonic()
        student, perplexities, log = self.distilled(converted, distilled)
        return {
            "settings": converted | distilled,
            "perplexity": {name: texts["held-out"] for name, texts in perplexities.items()},
            "kl": self.divergence(student),
            "losses": [round(row["loss"], 4) for row in log],
            "tokens_per_s": round(log[-1]["perf/tokens_per_s"]),
            "seconds": round(time.monotonic() - began, 1),
        }

    def distilled(
        self, converted: dict[str, Any], changed: dict[str, Any]
    ) -> tuple[SSEForCausalLM, Perplexities, list[dict[str, float]]]:
        """A student after both stages, what was measured on the way, and the log."""
        wanted = Convert(source=self.options.source, **CONVERTED | converted)
        student = convert(self.origin, wanted).to(self.options.device)
        settings: dict[str, Any] = {
            "align_steps": self.options.align_steps,
            "max_steps": self.options.steps,
            "per_device_train_batch_size": self.options.rows,
            "max_length": self.options.length,
            "warmup_steps": 10,
            "eval_tokens": self.options.eval_tokens,
            "bf16": self.options.device == "cuda",
            "save_steps": 0,
        }
        log: list[dict[str, float]] = []
        with tempfile.TemporaryDirectory() as folder:
            perplexities = distill(
                student,
                as_softmax(self.origin, self.options.source).to(self.options.device),
                self.text,
                {"held-out": self.held_out},
                options=Distill(**settings | DISTILLED | changed),
                seed=0,
                state=Path(folder),
                progress=lambda step, metrics: log.append({"step": step, **metrics}),
            )
        return student, perplexities, log

    def order(self, count: int) -> list[dict[str, Any]]:
        """Layers put back to attention one after another, the one that helps most first, with the
        divergence that is left; before them, that of a model with none."""
        student, _, _ = self.distilled({"attention_layers": []}, {"max_steps": 0})
        blocks: Any = student.model.layers
        attention: Any = [block.attn for block in self.teacher.model.layers]  # pyright: ignore
        found: list[dict[str, Any]] = [{"layer": None, "kl": round(self.divergence(student), 4)}]
        print(json.dumps(found[-1]), flush=True)
        while len(found) <= count:
            tried = {}
            for i, block in enumerate(blocks):
                if isinstance(block.attn, SSEMixer):
                    mixer, block.attn = block.attn, attention[i]
                    tried[i] = self.divergence(student)
                    block.attn = mixer
            best = min(tried, key=tried.__getitem__)
            blocks[best].attn = attention[best]
            found.append({"layer": best, "kl": round(tried[best], 4)})
            print(json.dumps(found[-1]), flush=True)
        return found

    @torch.no_grad()
    def divergence(self, model: SSEForCausalLM) -> float:
        """KL(teacher | model) in nats a token."""
        total, count = 0.0, 0
        for rows, wanted in zip(self.measured(), self.reference, strict=True):
            hidden = self.hidden(model, rows)
            for ours, theirs in zip(hidden.split(2048), wanted.split(2048), strict=True):
                mine = F.log_softmax(model.logits(ours), -1)
                target = F.log_softmax(self.teacher.logits(theirs), -1)
                total += float(F.kl_div(mine, target, reduction="sum", log_target=True))
            count += len(rows.tokens)
        return total / count

    @torch.no_grad()
    def hidden(self, model: SSEForCausalLM, rows: Rows) -> torch.Tensor:
        device = self.options.device
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            seqs = packed_inputs(rows.lengths, device=device)
            return model.packed(torch.from_numpy(rows.tokens).to(device), seqs).hidden

    def measured(self) -> list[Rows]:
        return self.held_out.in_order(self.options.kl_tokens, self.options.rows)


def write(
    options: argparse.Namespace, rows: list[dict[str, Any]], order: list[dict[str, Any]]
) -> None:
    cpu = f" --device cpu --rows {options.rows} --length {options.length}"
    command = (
        "python benchmarks/conversion.py --source SmolLM2-135M-Instruct "
        "--train gsm8k_train.jsonl --held-out gsm8k_test.jsonl"
        f"{'' if options.device == 'cuda' else cpu}"
        f" --align-steps {options.align_steps} --steps {options.steps}"
    )
    result = {
        "name": "conversion",
        **header(options.device, command, options.commit),
        "tokens_a_step": options.rows * options.length,
        "kl_tokens": options.kl_tokens,
        "order": order,
        "rows": rows,
    }
    save(result, options.out, "conversion")


if __name__ == "__main__":
    main()
