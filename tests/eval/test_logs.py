import json
from pathlib import Path

import pytest
from sse_eval import EvaluationError, evaluate
from sse_eval.logs import export_lighteval, export_lm_eval

SETTINGS = {"samples": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 100, "seed": 3}


@pytest.fixture
def folder(tmp_path, problems, golds, fake_model, pool) -> Path:
    evaluate(problems, fake_model(golds), tmp_path / "e", pool=pool, **SETTINGS)
    return tmp_path / "e"


def test_lm_eval_gets_a_line_for_each_problem_with_all_its_samples(folder: Path):
    assert export_lm_eval(folder, folder / "samples_aime31.jsonl") == 6
    lines = [json.loads(line) for line in (folder / "samples_aime31.jsonl").open()]
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(line["exact_match"] for line in lines) / 6 == pytest.approx(summary["avg"])
    assert all(len(line["resps"][0]) == len(line["filtered_resps"]) == 4 for line in lines)
    assert lines[0]["target"] == "204" and len(lines[0]["prompt_hash"]) == 64
    assert lines[0]["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] == 100


def test_lighteval_gets_its_details_as_parquet(folder: Path):
    import pyarrow.parquet

    assert export_lighteval(folder, folder / "details_aime31.parquet") == 6
    rows = pyarrow.parquet.read_table(folder / "details_aime31.parquet").to_pylist()
    assert rows[0].keys() == {"doc", "metric", "model_response"}
    assert rows[0]["doc"]["choices"] == ["204"]
    assert len(rows[0]["model_response"]["text"]) == 4
    assert 0 <= rows[0]["metric"]["avg@4"] <= 1


def test_a_folder_without_results_is_an_error(tmp_path: Path):
    with pytest.raises(EvaluationError, match="no evaluation's folder"):
        export_lm_eval(tmp_path, tmp_path / "x.jsonl")
