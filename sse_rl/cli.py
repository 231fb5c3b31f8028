"""The `sse-rl` command: arguments in, one call, an exit code out.

0 done, 1 a failed run or a missed threshold, 2 bad usage or input (one message, no traceback),
143 ended by SIGTERM. Commands import what they need, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sse_rl.errors import Interrupted, RunError, UserError

if TYPE_CHECKING:
    from sse_eval import Summary

app = typer.Typer(
    name="sse-rl",
    help="Reinforcement learning of reasoning for SSE-H language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, recipes/*.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeatable.")
]
DTYPES = ("auto", "float32", "bfloat16", "float16")
Address = Annotated[
    str, typer.Option(help="auto: a running Ray cluster, else local; local; or HOST:PORT.")
]


def main() -> NoReturn:
    for library in ("HF_DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns of every fork
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except UserError as error:
        print(f"sse-rl: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"sse-rl: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs_dir: Annotated[Path, typer.Option(help="Where run folders lie.")] = Path("runs"),
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|STEP", help="Go on with an unfinished run, or from a checkpoint."
        ),
    ] = "auto",
    address: Address = "auto",
    dry_run: Annotated[bool, typer.Option(help="Check everything, train nothing.")] = False,
) -> None:
    """Train by a recipe: cold start, GRPO, evaluation, export."""
    from sse_rl.recipe_io import load_recipe

    if resume not in ("auto", "never") and not resume.isdigit():
        raise UserError(f"--resume {resume}: expected auto, never or a step")
    checked = load_recipe(recipe, overrides or [])
    from sse_rl.pipeline import stages

    summary = stages.run(
        checked, runs_dir=runs_dir, resume=resume, address=address, dry_run=dry_run
    )
    _print_json(summary)
    if summary.get("status") == "failed":
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="A model folder, a run or a checkpoint; none with --endpoint."),
    ] = None,
    benchmark: Annotated[
        str, typer.Option(metavar="NAME,FILE.jsonl,...", help="Benchmarks by name or file.")
    ] = "",
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem.")] = 32,
    temperature: Annotated[float, typer.Option(min=0)] = 0.6,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 32768,
    seed: int = 0,
    prompt: Annotated[
        str, typer.Option(metavar="default|matharena|TEXT", help="TEXT has {problem} in it.")
    ] = "default",
    limit: Annotated[int | None, typer.Option(min=1, help="The first problems only.")] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenAI-compatible; the key is read from OPENAI_API_KEY."),
    ] = None,
    served_model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="At --endpoint; default: the only one."),
    ] = None,
    address: Address = "auto",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Engines, by default one a GPU; at --endpoint, requests (16)."),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Answers that an engine writes at a time.")
    ] = 256,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="|".join(DTYPES),
            help="What engines compute in; auto is the checkpoint's own.",
        ),
    ] = "auto",
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="Off for a base model.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Default: evals/<model>.")] = None,
    logs: Annotated[
        str, typer.Option(metavar="lm-eval,lighteval", help="Write samples in these shapes too.")
    ] = "",
    dry_run: Annotated[bool, typer.Option(help="Check everything, ask nothing.")] = False,
    fail_under: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit 1 if a score is below this.")
    ] = None,
) -> None:
    """Evaluate a model, with a report; goes on where it stopped."""
    if (model is None) == (endpoint is None):
        raise UserError("give a model's folder, or --endpoint URL with --model NAME")
    if endpoint is None and served_model is not None:
        raise UserError(f"--model {served_model}: names a model at --endpoint, which is not given")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if endpoint is not None and dtype != "auto":
        raise UserError(f"--dtype {dtype}: the server at --endpoint chooses its own")
    from sse_eval.logs import check_formats

    from sse_rl.evaluation import Checkpoint, Evaluation, Protocol, Served
    from sse_rl.pipeline.evaluate import as_user_error
    from sse_rl.report.console import RunConsole

    as_user_error(check_formats, _names(logs))
    protocol = Protocol(
        _names(benchmark), samples, temperature, top_p, max_tokens, seed, prompt, limit
    )
    if endpoint is not None:
        target = Served(endpoint, served_model, workers or 16)
    else:
        target = Checkpoint(str(model), address, workers, max_num_seqs, chat_template, dtype)
    evaluation = Evaluation(target, protocol, out)
    for remark in evaluation.remarks():
        typer.echo(remark, err=True)
    if dry_run:
        _print_json([plan._asdict() for plan in evaluation.plans()])
        return
    with RunConsole("eval") as console:
        try:
            summaries = evaluation.run(
                lambda name, done, wanted: console.stage(f"eval {name}", f"{done}/{wanted}")
            )
        except (Interrupted, SystemExit):  # the latter from `_terminate`, where Ray is not started
            console.say(f"stopped; answers are kept, the same command goes on ({evaluation.root})")
            raise SystemExit(143) from None
    for path in evaluation.folders.values():
        _write_logs(path, logs)
    _show_scores(summaries, evaluation.folders, fail_under)


@app.command()
def regrade(
    folder: Annotated[
        Path,
        typer.Argument(help="An evaluation's folder, one of several, or a run: all of its own."),
    ],
    logs: Annotated[
        str, typer.Option(metavar="lm-eval,lighteval", help="Write samples in these shapes too.")
    ] = "",
    fail_under: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit 1 if a score is below this.")
    ] = None,
) -> None:
    """Grade an evaluation's stored answers again and write its reports anew, without a model."""
    import sse_eval
    from sse_eval.logs import check_formats

    from sse_rl.evaluation import evaluation_folders
    from sse_rl.pipeline.evaluate import as_user_error
    from sse_rl.pipeline.summary import rescore

    as_user_error(check_formats, _names(logs))
    summaries, folders = {}, {path.name: path for path in evaluation_folders(folder)}
    for name, path in folders.items():
        summaries[name] = as_user_error(sse_eval.regrade, path)
        _write_logs(path, logs)
    if (folder / "recipe.yaml").is_file():
        try:
            rescore(folder)
        except UserError as error:  # a recipe of another version; the evaluations are graded
            print(f"sse-rl: the run's summary stays as it was: {error}", file=sys.stderr)
    _show_scores(summaries, folders, fail_under)


@app.command()
def grade(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Rows {completion, answer}.")],
    kind: Annotated[
        str, typer.Option(metavar="auto|aime|math", help="Of rows without one.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write each row with its grade here.")] = None,
    fail_under: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit 1 if the score is below this.")
    ] = None,
) -> None:
    """Grade answers."""
    from sse_rl.grading import grade_file

    grades = grade_file(file, kind)
    if out is not None:
        rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in grades.rows)
        out.write_text("".join(rows), encoding="utf-8")
    shown = "nothing to score" if grades.score is None else f"{100 * grades.score:.1f} %"
    if unscored := len(grades.rows) - grades.scored:
        shown += f" of {grades.scored}, {unscored} have no good gold"
    print(f"{len(grades.rows)} answers: {shown}")
    for status, count in grades.statuses.items():
        print(f"  {status:<20} {count}")
    if fail_under is not None and (grades.score or 0.0) < fail_under:
        raise typer.Exit(1)


@app.command()
def compare(
    before: Annotated[
        Path, typer.Argument(metavar="A", help="An evaluation's folder, one of several, or a run.")
    ],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same benchmarks.")],
    max_drop: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit 1 if B is further below A than this.")
    ] = None,
) -> None:
    """Compare two evaluations, paired by problem."""
    from sse_eval.compare import compare, describe

    from sse_rl.evaluation import pairs
    from sse_rl.pipeline.evaluate import as_user_error

    found = [
        as_user_error(compare, old, new, max_drop=max_drop) for old, new in pairs(before, after)
    ]
    print("\n".join(map(describe, found)), end="")
    if not all(comparison.passes for comparison in found):
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    push_to_hub: Annotated[str | None, typer.Option(metavar="ID", help="Upload it too.")] = None,
) -> None:
    """Write a folder that plain transformers loads."""
    from transformers import AutoTokenizer

    from sse_rl.export import export_model
    from sse_rl.pipeline.evaluate import load_policy, model_folder

    folder = model_folder(str(source))
    if out.exists():
        raise UserError(f"{out}: exists already, choose another folder")
    model = load_policy(folder)
    export_model(model, AutoTokenizer.from_pretrained(folder), out)
    print(out)
    if push_to_hub is not None:
        from huggingface_hub import HfApi

        HfApi().create_repo(push_to_hub, exist_ok=True)
        print(HfApi().upload_folder(repo_id=push_to_hub, folder_path=out))


@app.command("convert")
def convert_model(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="Llama, Qwen2 or Qwen3: folder, hub id, GGUF.")
    ],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    attention_layers: Annotated[
        str | None,
        typer.Option(
            metavar="N|I,J,...|all",
            help="How many layers stay softmax attention, or which (I, for a single one). "
            "Default: one in four.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of model.convert; repeatable."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file, for a tokenizer without one.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Measure teacher and result on this text file.")
    ] = None,
    seed: int = 0,
) -> None:
    """Turn a softmax Transformer into an SSE-H model; recipes distil it (docs/conversion.md)."""
    from sse_rl.pipeline.conversion import convert_checkpoint

    report = convert_checkpoint(
        source,
        out,
        attention_layers=attention_layers,
        overrides=overrides or [],
        chat_template=chat_template,
        text=text,
        seed=seed,
    )
    for name, value in report.items():
        print(f"{name:<22} {value}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's HTML report: curves and sample rollouts."""
    from sse_rl.report.html import write_report

    print(write_report(run))


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Look at this Ray cluster too.")] = None,
) -> None:
    """What this machine and cluster can do, and what is wrong with them."""
    from sse_rl.doctor import examine

    findings = examine(address)
    for name, value in findings.facts.items():
        print(f"{name:<14} {value}")
    for problem in findings.problems:
        print(f"PROBLEM        {problem}")
    if findings.problems:
        raise typer.Exit(1)
    print("No problems found.")


@recipe_app.command()
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe: keys, types, combinations, the files that it names."""
    from sse_rl.recipe_io import check_files, load_recipe

    check_files(load_recipe(recipe, overrides or []), origin=str(recipe))
    print(f"{recipe}: ok")


@recipe_app.command()
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print a recipe with every default written out."""
    from sse_rl.recipe_io import load_recipe, resolve

    print(resolve(load_recipe(recipe, overrides or [])), end="")


@recipe_app.command()
def schema(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON Schema, for editors.")] = False,
) -> None:
    """Print every key with its type, default and meaning."""
    from sse_rl.recipe import Recipe
    from sse_rl.recipe_io import describe

    if as_json:
        _print_json(Recipe.model_json_schema())
        return
    for key, kind, default, meaning in describe():
        print(f"{key}: {kind}" + ("" if default == "required" else f" = {default}"))
        if meaning:
            print(f"    {meaning}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _show_scores(
    summaries: Mapping[str, Summary],
    folders: Mapping[str, Path],
    fail_under: float | None,
) -> None:
    """Each benchmark's score, what warns of it, and its report; Exit 1 if a score is below
    `fail_under`."""
    from sse_eval.words import between, findings

    for name, summary in summaries.items():
        shown = "no samples"
        if summary["avg"] is not None:
            asked_again, others = summary["ci_sampling"], summary["ci_bootstrap"]
            interval = f"asked again {between(asked_again)}, " if asked_again else ""
            shown = f"{100 * summary['avg']:.1f} % ({interval}other problems {between(others)})"
        print(f"{name}: avg@{summary['samples']} {shown}")
        for finding in findings(summary):
            if finding.warns or summary["avg"] == 0:
                print(f"  {finding.text}")
        print(f"  {folders[name] / 'report.md'}")
    scores = [summary["avg"] or 0.0 for summary in summaries.values()]
    if fail_under is not None and min(scores) < fail_under:
        raise typer.Exit(1)


def _write_logs(folder: Path, formats: str) -> None:
    from sse_eval.logs import export_logs

    for file in export_logs(folder, _names(formats)):
        print(file)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
