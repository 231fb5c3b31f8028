import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sse_eval import SampleOutput, evaluate
from sse_eval.transcripts import PAGE, problems_html
from sse_eval.types import Problem

SETTINGS = {"samples": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 100, "seed": 3}
VOID = {"meta", "link", "br"}


class Checker(HTMLParser):
    """Collects addresses and holds that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def folder(tmp_path, problems, golds, fake_model, pool) -> Path:
    model = {"name": "<img src=x onerror=alert(1)> model"}
    evaluate(problems, fake_model(golds), tmp_path / "e", pool=pool, model=model, **SETTINGS)
    return tmp_path / "e"


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_the_page_is_whole_and_needs_nothing_from_outside(folder: Path):
    page = (folder / "report.html").read_text()
    checker = checked(page)
    assert checker.addresses == ["data:,"]
    assert not re.search(r"https?://|//cdn|@import|url\(", page)
    assert not {"script", "img", "iframe"} & checker.tags
    assert "svg" in checker.tags


def test_the_page_leads_with_the_score_and_both_intervals(folder: Path):
    page = (folder / "report.html").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    for value in (summary["avg"], *summary["ci_sampling"], *summary["ci_bootstrap"]):
        assert f"{100 * value:.1f}" in page
    assert page.index('class="score"') < page.index("<h2>")


def test_model_text_cannot_break_out_of_the_page(tmp_path, problems, golds, fake_model, pool):
    class Hostile(fake_model):
        def answer(self, request):
            text = "</pre></details><script>alert(1)</script>\x00\ud800 \\boxed{<b>&}"
            return SampleOutput(request.id, request.sample, text, 9, "stop", "p")

    evaluate(problems, Hostile(golds), tmp_path / "h", pool=pool, **SETTINGS)
    page = (tmp_path / "h" / "report.html").read_bytes().decode()
    assert "script" not in checked(page).tags
    assert "\x00" not in page


def test_long_transcripts_are_shortened_to_what_a_phone_can_open():
    problems = [Problem(f"p{i}", "Find.", "7") for i in range(20)]
    rows = [
        {
            "id": problem.id,
            "sample": sample,
            "answer": "7",
            "completion": f"{sample} " + "so on " * 20_000 + r"\boxed{7}",
            "tokens": 20_000,
            "reward": float(sample == 3),
            "status": "correct" if sample == 3 else "wrong",
            "extracted": "7",
        }
        for problem in problems
        for sample in range(8)
    ]
    page = problems_html(problems, rows)
    assert len(page) < 1.2 * PAGE
    assert page.count(r"\boxed{7}") >= 20
    assert "sample 3" in page and "results.jsonl line 4<" in page


def test_published_scores_stand_beside_those_of_aime24(
    tmp_path, benchmark_file, golds, fake_model, pool
):
    file = benchmark_file.rename(tmp_path / "aime24.jsonl")
    evaluate(file, fake_model(golds), tmp_path / "a", pool=pool, **SETTINGS)
    for name in ("report.html", "report.md"):
        text = (tmp_path / "a" / name).read_text()
        assert "SSE-H 2B" in text and "64.7" in text and "public since early 2024" in text


def test_a_greedy_single_sample_reads_as_such(tmp_path, problems, golds, fake_model, pool):
    settings = SETTINGS | {"samples": 1, "temperature": 0.0}
    evaluate(problems, fake_model(golds), tmp_path / "a", pool=pool, **settings)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "1 sample each, greedy" in page and "same problems asked again</dt>" not in page
