"""Writes a Hugging Face folder that plain transformers loads, with the model's code inside."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sse_rl.data.tokenizer import end_token_ids
from sse_rl.model import SSEForCausalLM

_CONFIGURATION = "sse_rl.model.configuration"
_MODELING = "sse_rl.model.modeling"
_OURS = ("sse_rl", "sse_kernels")


def export_model(
    model: SSEForCausalLM, tokenizer: PreTrainedTokenizerBase, out_dir: str | Path
) -> Path:
    """Weights (safetensors), config, generation config, tokenizer and remote code in `out_dir`.

    The folder loads with `trust_remote_code=True` and nothing of ours installed; it computes with
    the torch forms of the operators. It is written beside and renamed, so never half there.
    `generate()` stops where rollouts do: at each of `end_token_ids`.

    Raises:
        FileExistsError: `out_dir` exists.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise FileExistsError(f"{out_dir}: exists already, choose another folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}."))
    try:
        _write(model, tokenizer, beside)
        beside.chmod(0o755)
        beside.rename(out_dir)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out_dir


def remote_code() -> dict[str, str]:
    """File name -> text of the model's modules and all of ours they import, in one flat folder.

    A module that needs triton becomes a file that raises ImportError: whoever imports it, when a
    tensor calls for it, falls back to the torch form.
    """
    pending, files = [_CONFIGURATION, _MODELING], {}
    while pending:
        module = pending.pop()
        name = f"{_flat(module)}.py"
        if name in files:
            continue
        files[name], imported = _flattened(module)
        pending.extend(imported)
    return files


def _write(model: SSEForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = copy.deepcopy(model.generation_config)
    for key in ("bos_token_id", "pad_token_id"):
        if getattr(generation, key) is None:
            setattr(generation, key, getattr(tokenizer, key))
    own = generation.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    ends = list(dict.fromkeys([*end_token_ids(tokenizer), *own]))
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {
        "AutoConfig": f"{_flat(_CONFIGURATION)}.SSEConfig",
        "AutoModel": f"{_flat(_MODELING)}.SSEModel",
        "AutoModelForCausalLM": f"{_flat(_MODELING)}.SSEForCausalLM",
    }
    path.write_text(json.dumps(config, indent=2) + "\n")
    for name, text in remote_code().items():
        (folder / name).write_text(text)


def _flat(module: str) -> str:
    """Name of a module in the exported folder, e.g. modeling_sse, sse_kernels_gla_op."""
    if module.startswith("sse_rl.model."):
        return f"{module.rpartition('.')[2]}_sse"
    return module.replace(".", "_")


def _flattened(module: str) -> tuple[str, list[str]]:
    """The module's text with imports of ours made relative to one folder, and their names."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    package = module if spec.submodule_search_locations is not None else spec.parent
    text = Path(spec.origin).read_text()
    tree = ast.parse(text)
    if any(_imports(node, "triton") for node in tree.body):
        return 'raise ImportError("an export holds the torch forms only")\n', []
    lines, imported = text.splitlines(keepends=True), []
    for node in ast.walk(tree):
        for ours in _OURS:
            assert not _imports(node, ours), f"{module}: write `from {ours} import`, to be exported"
        if not isinstance(node, ast.ImportFrom):
            continue
        target = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        if target.split(".")[0] not in _OURS:
            continue
        imported.append(target)
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = re.sub(r"from\s+\S+", f"from .{_flat(target)}", line, count=1)
    return "".join(lines), imported


def _imports(node: ast.AST, package: str) -> bool:
    """Whether this is `import package` or `import package.module`."""
    return isinstance(node, ast.Import) and any(
        alias.name.split(".")[0] == package for alias in node.names
    )
