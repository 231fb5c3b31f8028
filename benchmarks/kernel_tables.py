"""The tables of kernels/README.md, from the result files of kernels/benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_table import table

RESULTS = Path(__file__).parent.parent / "kernels" / "benchmarks" / "results"
FORMS = {
    "triton": "",
    "triton, CUDA graph": "in a CUDA graph",
    "torch": "torch form",
    "reference": "the reference rebuilt on fla 0.6",
    "fla chunk_gla, one stream": "fla's `chunk_gla`, one stream, no router",
    "sse_gla and torch": "`sse_gla`, activations in torch",
}


def sequences() -> str:
    """Milliseconds of token mixing, a line a shape; baselines as multiples of ours beside them."""
    result = _result("sse")
    columns = [f"{v} {p}" for v in ("gla", "gdn") for p in ("forward", "forward+backward")]
    head = ["bf16, ms", "GLA forward", "forward+backward", "GDN forward", "forward+backward"]
    return _times(result, columns, head) + _note(result)


def sequence_layers() -> str:
    """Milliseconds of layers between their projections."""
    columns = [f"{v} layer {p}" for v in ("gla", "gdn") for p in ("forward", "forward+backward")]
    head = ["layer, bf16, ms", "GLA forward", "forward+backward", "GDN forward", "forward+backward"]
    return _times(_result("packed-layer"), columns, head) + _note(_result("packed-layer"))


def _times(result: dict[str, Any], columns: list[str], head: list[str]) -> str:
    times = {
        (r["shape"], r["form"], r["case"]): r["value"]
        for r in _rows(result, "ms")
        if r["case"] in columns
    }
    shapes = list(dict.fromkeys(shape for shape, _, _ in times))
    measured = dict.fromkeys((shape, form) for shape, form, _ in times)
    lines = []
    for shape, form in sorted(measured, key=lambda pair: shapes.index(pair[0])):
        cells = []
        for case in columns:
            time = times.get((shape, form, case))
            ours = times.get((shape, "triton", case))
            ratio = f" ({time / ours:.1f} x)" if time and ours and "triton" not in form else ""
            cells.append("" if time is None else f"{_three(time)}{ratio}")
        lines.append([shape if form == "triton" else FORMS[form], *cells])
    return table(head, lines)


def steps() -> str:
    """Microseconds and share of the copy bandwidth of one token a sequence."""
    result = _result("sse")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["rows"]:
        if row["case"].endswith(" step"):
            line = cells.setdefault((row["case"], row["form"]), {})
            text = line.get(row["shape"], "")
            is_time = row["unit"] == "us"
            more = f"{_three(row['value'])} us" if is_time else f", {100 * row['value']:.0f} %"
            line[row["shape"]] = text + more
    shapes = list(dict.fromkeys(shape for line in cells.values() for shape in line))
    lines = [
        [f"{case.split()[0].upper()}, {form.removeprefix('triton, ')}"]
        + [line.get(shape, "") for shape in shapes]
        for (case, form), line in cells.items()
    ]
    return table(["one token a sequence", *shapes], lines)


def layers() -> str:
    """Microseconds of one layer's decode step, fused and as separate modules, a line a shape."""
    result = _result("layer")
    found = {(r["case"], r["shape"], r["form"]): r["value"] for r in result["rows"]}
    lines = []
    for case, shape in dict.fromkeys((r["case"].split()[0], r["shape"]) for r in result["rows"]):
        share = found.get((f"{case} kernel", shape, "share of copy bandwidth"))
        cells = [_three(found[f"{case} kernel", shape, "fused"])]
        cells[0] += "" if share is None else f", {100 * share:.0f} %"
        for form in ("fused", "unfused"):
            time = found.get((f"{case} layer", shape, form))
            cells.append("" if time is None else _three(time))
        lines.append([f"{case.upper()}, {shape}", *cells])
    head = ["one token a sequence, us, CUDA graph", "kernel, share of copies", "layer", "unfused"]
    return table(head, lines) + _note(result)


def errors() -> str:
    """Largest relative error of outputs and gradients, a line a case."""
    result = _result("sse")
    kinds = ["o", "dq", "dk", "dv", "dg", "dbeta", "dlogits"]
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in _rows(result, "relative"):
        line = found.setdefault((row["case"], row["shape"]), {})
        kind = row["form"].rstrip("12")
        line[kind] = max(line.get(kind, 0.0), row["value"])
    lines = [
        [f"{_upper(case.replace(' error', ''))}, {shape}"]
        + [f"{line[kind]:.1e}" if kind in line else "" for kind in kinds]
        for (case, shape), line in found.items()
    ]
    return table(["relative error against fp64", *kinds], lines)


def kept() -> str:
    """Memory kept for the backward pass, in rows of the width of v."""
    result = _result("kept")
    cells: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        form, _, decays = row["case"].partition(" kept for backward")
        name = f"`sse_{form.replace(' ', '_')}`{decays}"
        cells.setdefault(name, {})[row["shape"]] = row["value"]
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    lines = [
        [form, *(f"{x[s]:.3f}" if s in x else "" for s in shapes)] for form, x in cells.items()
    ]
    return table(["bf16 rows of H*D a token", *shapes], lines) + _note(result)


def properties() -> str:
    """Differing bits, waits for the device."""
    result = _result("sse")
    lines = [
        [_upper(row["case"]), row["shape"], f"{row['value']} {unit}"]
        for unit in ("elements differ", "waits")
        for row in _rows(result, unit)
    ]
    return table(["", "", ""], lines)


def first_calls() -> str:
    """Seconds of first calls with nothing compiled."""
    result = _result("first-calls")
    lines = [[row["case"], f"{row['value']:.1f}"] for row in result["rows"]]
    return table(["nothing compiled, a process each", "s"], lines) + _note(result)


def head_times() -> str:
    """Time and memory of the language-model head, beside its four products in the same run."""
    result = _result("head")
    cells = _by_shape_and_form(result)
    floors: dict[str, float] = {}
    for (shape, _), line in cells.items():
        if "four products" in line:
            floors[shape] = min(line["four products"], floors.get(shape, line["four products"]))
    lines = []
    for (shape, form), line in cells.items():
        if "peak memory" in line:
            both, floor = line["forward+backward"], floors[shape]
            times = [_three(x) for x in (line["forward"], both, floor)]
            more = [f"{both / floor:.2f}", f"{line['peak memory']:.2f}"]
            lines.append([f"{form}, {shape}", *times, *more])
    head = ["bf16", "forward, ms", "forward+backward", "four products", "ratio", "memory, GB"]
    return table(head, lines) + _note(result)


def head_errors() -> str:
    """The head's errors against fp64, a line a form."""
    kinds = ["log-prob, max", "log-prob, mean", "entropy, max"]
    kinds += ["hidden's gradient", "weight's gradient"]
    lines, shape = [], ""
    for (at, form), line in _by_shape_and_form(_result("head")).items():
        if f"error of {kinds[0]}" in line:
            found = [line.get(f"error of {kind}") for kind in kinds]
            lines.append([form, *("" if x is None else f"{x:.1e}" for x in found)])
            shape = at
    return table([f"error against fp64, {shape}", *kinds], lines)


def _by_shape_and_form(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """What each form measured, by case."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in result["rows"]:
        cells.setdefault((row["shape"], row["form"]), {})[row["case"]] = row["value"]
    return cells


def attention() -> str:
    """Microseconds of paged decode attention, its share of copy bandwidth, and the baselines."""
    result = _result("attention")
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in result["rows"]:
        found.setdefault(row["shape"], {})[row["form"], row["unit"]] = row["value"]
    forms = ["gathered, SDPA", "varlen_attn, no pages"]
    lines = []
    for shape, values in found.items():
        ours = values["triton", "us"]
        share = f"{100 * values['triton', 'of copy bandwidth']:.0f} %"
        others = [values.get((form, "us")) for form in forms]
        ratios = ["" if other is None else f"{other / ours:.1f} x" for other in others]
        lines.append([shape, f"{_three(ours)}", share, *ratios])
    head = ["32 heads in groups of 4, bf16", "us", "of copy bandwidth", *forms]
    return table(head, lines) + _note(result)


def _result(name: str) -> dict[str, Any]:
    (path,) = RESULTS.glob(f"{name}-nvidia*.json")
    return json.loads(path.read_text())


def _rows(result: dict[str, Any], unit: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["unit"] == unit]


def _upper(case: str) -> str:
    return case.replace("gla", "GLA").replace("gdn", "GDN")


def _three(value: float) -> str:
    """Three digits."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _note(result: dict[str, Any]) -> str:
    top = result.get("ceilings")
    ceilings = (
        f"copies {top['copy_gb_s']:.0f} GB/s, bf16 products {top['matmul_tflop_s']:.0f} TFLOP/s; "
        if top
        else ""
    )
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in result.get("notes", []))
    return (
        f"\n{result['device']}, {ceilings}torch {result['torch']}, triton {result['triton']}, "
        f"{result['date']}, commit {result['commit']}, `{result['command']}`.{notes}\n"
    )


TABLES = {
    "kernel_sequences": sequences,
    "kernel_sequence_layers": sequence_layers,
    "kernel_steps": steps,
    "kernel_layers": layers,
    "kernel_errors": errors,
    "kernel_kept": kept,
    "kernel_properties": properties,
    "kernel_first_calls": first_calls,
    "head_times": head_times,
    "head_errors": head_errors,
    "kernel_attention": attention,
}
