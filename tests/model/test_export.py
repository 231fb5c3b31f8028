"""An exported folder is loaded by plain transformers, where nothing of ours is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sse_rl.data.tokenizer import PAD, byte_tokenizer, end_token_ids
from sse_rl.export import export_model, remote_code
from sse_rl.model import SSEForCausalLM

LOAD = """
import importlib.util, os, sys
ours = "sse_rl", "sse_kernels"
sys.path = [p for p in sys.path if not any(os.path.isdir(os.path.join(p, name)) for name in ours)]
sys.modules["triton"] = None
for package in ours:
    assert importlib.util.find_spec(package) is None, package
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("abca", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(torch.arange(1, 80).view(1, -1) % 50).logits
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    torch.save({"logits": logits, "ids": ids, "generated": generated}, folder + "/result.pt")
"""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def test_plain_transformers_loads_an_export(tiny_config, tokenizer, tmp_path):
    torch.manual_seed(0)
    exported = {}
    for kind in ("gla", "gdn"):
        config = tiny_config(linear_attn_type=kind, eos_token_id=None, bos_token_id=None)
        model = SSEForCausalLM(config).eval()
        exported[export_model(model, tokenizer, tmp_path / kind)] = model
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "code"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", LOAD, *map(str, exported)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    for folder, model in exported.items():
        result = torch.load(folder / "result.pt")
        with torch.no_grad():
            expected = model(torch.arange(1, 80).view(1, -1) % 50).logits
        assert (result["logits"] - expected).abs().max() < 1e-5
        assert result["ids"].tolist() == [[2, 3, 4, 2]]
        mask = torch.ones(1, 4, dtype=torch.int64)
        own = model.generate(result["ids"], attention_mask=mask, max_new_tokens=5, eos_token_id=1)
        assert torch.equal(result["generated"], own)
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == 1


def test_an_export_stops_where_rollouts_do(gla_model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = PAD
    gla_model.generation_config.eos_token_id = 7
    folder = export_model(gla_model, tokenizer, tmp_path / "export")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [*end_token_ids(tokenizer), 7]
    assert len(end_token_ids(tokenizer)) == 2


def test_an_existing_folder_is_refused_and_left_alone(gla_model, tokenizer, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        export_model(gla_model, tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_a_failed_export_leaves_nothing(gla_model, tmp_path):
    with pytest.raises(AttributeError):
        export_model(gla_model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_exported_code_imports_nothing_of_ours_by_name():
    files = remote_code()
    assert {"configuration_sse.py", "modeling_sse.py", "sse_kernels.py"} <= files.keys()
    for name, text in files.items():
        assert not re.search(r"^\s*(from|import) (sse_|triton)", text, re.MULTILINE), name
