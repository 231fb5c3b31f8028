"""The import rules of docs/architecture.md, held by reading the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "sse_rl": ROOT / "sse_rl",
    "sse_kernels": ROOT / "kernels" / "sse_kernels",
    "sse_rewards": ROOT / "rewards" / "sse_rewards",
    "sse_eval": ROOT / "eval" / "sse_eval",
}
ALLOWED = {"sse_kernels": set(), "sse_rewards": set(), "sse_eval": {"sse_rewards"}}


def imports(path: Path) -> set[str]:
    """The top packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    for path in PACKAGES[package].rglob("*.py"):
        ours = imports(path) & PACKAGES.keys() - {package}
        assert ours <= ALLOWED[package], path


def test_only_sse_rl_knows_ray():
    for package in ALLOWED:
        for path in PACKAGES[package].rglob("*.py"):
            assert "ray" not in imports(path), path


def test_the_schema_of_recipes_imports_no_torch():
    assert not imports(ROOT / "sse_rl" / "recipe.py") & {"torch", "transformers", "ray"}


def test_folders_that_hold_packages_are_none_themselves():
    for folder in ("kernels", "rewards", "eval", "recipes"):
        assert not (ROOT / folder / "__init__.py").exists(), folder
    assert not list((ROOT / "tests").rglob("__init__.py"))
