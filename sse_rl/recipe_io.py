"""Recipes as text: read, overridden, checked, printed. What a key means is `recipe.py`'s business.

YAML is read by its 1.2 core rules: `1e-6` is a number, `no` and `on` are words, a key stands once.
Every fault is a `UserError` that names the dotted key, the value found and what was expected.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sse_rl import yaml12
from sse_rl.errors import UserError
from sse_rl.recipe import Convert, Recipe, Section


class Difference(NamedTuple):
    """A dotted key and what two recipes have there; None where the key is absent."""

    key: str
    a: Any
    b: Any


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in file `path`, with `a.b=c` overrides applied before it is checked."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return parse_recipe(text, overrides, origin=str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), *, origin: str = "recipe") -> Recipe:
    """The recipe written in `text`; `origin` opens every error message."""
    tree = yaml12.parse(text, origin)
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: a recipe is a mapping of sections, this is {_show(tree)}")
    for override in overrides:
        _apply(tree, override)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors(include_url=False)]
        raise UserError("\n".join(f"{origin}: {problem}" for problem in problems)) from None
    if recipe.model.config is not None:
        context = check_model_config(recipe.model.config, origin=origin)
        check_context(recipe, context, origin=origin)
    return recipe


def parse_convert(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Convert:
    """The `model.convert` section in `tree`, with `key=value` overrides applied first."""
    for override in overrides:
        _apply(tree, override)
    try:
        return Convert.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False)
        for detail in details:
            detail["loc"] = ("model", "convert", *detail["loc"])
        raise UserError("\n".join(map(_explain, details))) from None


def resolve(recipe: Recipe) -> str:
    """Canonical YAML with every default written out; reading it again gives an equal recipe."""
    return yaml12.write(recipe.model_dump())


def differences(a: Recipe, b: Recipe) -> Iterator[Difference]:
    """Where two recipes differ, in the schema's order."""
    return _differences(a.model_dump(), b.model_dump(), ())


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Every key of the schema as (dotted key, type, default, description)."""
    yield from _describe(Recipe, ())


def check_model_config(config: dict[str, Any], *, origin: str = "recipe") -> int:
    """The context length of the SSEConfig that `config` describes; UserError if it has a fault."""
    from sse_rl.model.configuration import SSEConfig

    types = inspect.get_annotations(SSEConfig, eval_str=True)
    for key, value in config.items():
        if key not in types:
            raise UserError(f"{origin}: {_unknown(('model', 'config', key), types)}")
        try:
            TypeAdapter(types[key]).validate_python(value, strict=True)
        except ValidationError as error:
            expected = _expected(error.errors(include_url=False)[0]["msg"])
            raise UserError(f"{origin}: model.config.{key} = {_show(value)}: {expected}") from None
    try:
        return SSEConfig(**config).max_position_embeddings
    except ValueError as error:
        raise UserError(f"{origin}: model.config: {error}") from None


def check_context(recipe: Recipe, context: int, *, origin: str = "recipe") -> None:
    """Raise UserError if a prompt and its completion may be longer than the model's `context`."""
    wanted: dict[str, int] = {}
    if recipe.grpo:
        wanted["data.max_prompt_length + grpo.max_completion_length"] = (
            recipe.data.max_prompt_length + recipe.grpo.max_completion_length
        )
    if recipe.eval.max_tokens:
        wanted["data.max_prompt_length + eval.max_tokens"] = (
            recipe.data.max_prompt_length + recipe.eval.max_tokens
        )
    for key, tokens in wanted.items():
        if tokens > context:
            raise UserError(
                f"{origin}: {key} = {tokens}: more than the model's context of {context} tokens "
                "(max_position_embeddings)"
            )


def check_files(recipe: Recipe, *, origin: str = "recipe") -> None:
    """Raise UserError if a file or folder that the recipe names is not there."""
    data = recipe.data
    files = {
        "data.chat_template": data.chat_template,
        "data.train.path": data.train.path,
        "data.test.path": data.test.path if data.test else None,
    }
    if recipe.grpo is not None and recipe.grpo.difficulty is not None:
        files["grpo.difficulty.path"] = recipe.grpo.difficulty.path
    if recipe.distill is not None:
        for name in ("corpora", "eval"):
            for index, corpus in enumerate(getattr(recipe.distill, name)):
                files[f"distill.{name}.{index}.path"] = corpus.path
    source = recipe.model.convert.source if recipe.model.convert else ""
    if source.endswith(".gguf"):
        files["model.convert.source"] = source
    for index, component in enumerate(recipe.rewards.components):
        files[f"rewards.components.{index}.name"] = component.file
    if recipe.model.path is not None and not Path(recipe.model.path).is_dir():
        raise UserError(f"{origin}: model.path = {recipe.model.path}: no such folder")
    for key, path in files.items():
        if path is not None and not Path(path).is_file():
            raise UserError(f"{origin}: {key} = {path}: no such file")


# ---- overrides ---------------------------------------------------------------------------------


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in `tree`; the value is YAML, a number in the path indexes a list."""
    dotted, equals, text = override.partition("=")
    path = dotted.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"--set {override}: expected key=value, such as grpo.learning_rate=1e-4")
    value = yaml12.parse(text, f"--set {override}")
    node: Any = tree
    for depth, key in enumerate(path[:-1]):
        node = _child(node, key, path[: depth + 1], override)
    if isinstance(node, list):
        node[_index(node, path[-1], path, override)] = value
    else:
        node[path[-1]] = value


def _child(node: Any, key: str, path: list[str], override: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, key, path, override)]
    else:
        if node.get(key) is None:
            node[key] = {}
        child = node[key]
    if not isinstance(child, dict | list):
        raise UserError(
            f"--set {override}: {'.'.join(path)} is {_show(child)}, it has no keys inside"
        )
    return child


def _index(items: list[Any], key: str, path: list[str], override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise UserError(
            f"--set {override}: {'.'.join(path)}: {'.'.join(path[:-1])} is a list of "
            f"{len(items)}, expected an index below that"
        )
    return int(key)


# ---- messages ----------------------------------------------------------------------------------


def _explain(detail: ErrorDetails) -> str:
    """One pydantic error as `key = value: what was expected`."""
    path, kind, message = detail["loc"], detail["type"], detail["msg"]
    dotted = ".".join(map(str, path))
    if kind == "extra_forbidden":
        section = _section_at(path[:-1])
        return _unknown(path, list(section.model_fields) if section else [])
    if kind == "missing":
        return f"{dotted}: missing, and it has no default"
    message = _expected(message)
    if isinstance(detail["input"], dict) and kind == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted} = {_show(detail['input'])}: {message}"


def _expected(message: str) -> str:
    message = message.removeprefix("Value error, ").replace("Input should be", "expected", 1)
    return message.replace("a valid i", "an i").replace("a valid ", "a ")


def _unknown(path: Sequence[int | str], siblings: Collection[str]) -> str:
    """`a.b: unknown key; did you mean a.c?`: a close sibling, else the same word elsewhere."""
    dotted, key = ".".join(map(str, path)), str(path[-1])
    prefix = [*map(str, path[:-1])]
    beside = lambda cutoff: [
        ".".join([*prefix, name])
        for name in difflib.get_close_matches(key, siblings, n=1, cutoff=cutoff)
    ]
    elsewhere = [name for name, *_ in describe() if name.split(".")[-1] == key]
    guess = next(iter(beside(0.75) or elsewhere or beside(0.6)), None)
    return f"{dotted}: unknown key" + (f"; did you mean {guess}?" if guess else "")


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _section_at(path: Sequence[int | str]) -> type[Section] | None:
    section: type[Section] | None = Recipe
    for key in path:
        if isinstance(key, int):
            continue
        if section is None or key not in section.model_fields:
            return None
        section = _section_in(section.model_fields[key].annotation)
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """The section inside `Section`, `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


# ---- the schema as a table, and differences ----------------------------------------------------


def _describe(section: type[Section], path: tuple[str, ...]) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None:
            step = ("0",) if str(field.annotation).startswith("list") else ()
            yield from _describe(inner, (*path, name, *step))
            continue
        if field.is_required():
            default = "required"
        else:
            default = yaml12.write(field.get_default(call_default_factory=True), one_line=True)
        description = " ".join((field.description or "").split())
        yield ".".join((*path, name)), _type_name(field.annotation), default, description


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, args))
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return "mapping"
    return "null" if annotation is NoneType else str(annotation.__name__)


def _differences(a: Any, b: Any, path: tuple[str, ...]) -> Iterator[Difference]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                yield Difference(".".join((*path, key)), a.get(key), b.get(key))
            else:
                yield from _differences(a[key], b[key], (*path, key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _differences(left, right, (*path, str(index)))
    elif a != b:
        yield Difference(".".join(path), a, b)
