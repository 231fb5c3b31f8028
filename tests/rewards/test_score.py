"""The contract of `score`: statuses, purity, golds, lenient mode, cost of the import."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sse_rewards import Result, score, score_batch, validate_gold

PIECES = [r"\boxed{", "}", "{", r"\{", r"\frac", r"\text{", r"\left(", ")", "[", "]", "^", "_", "!"]
PIECES += [",", "=", "<", r"\pm", "204", "1", "x", r"\infty", r"\\", "$", "%"]
PIECES += ["<think>", "</think>", "<|im_end|>", "\x00", "\u200b", "２", "\ud800", "\n", "\\"]


def test_each_status_has_its_case():
    assert score(r"\boxed{204}", "204").status == "correct"
    assert score(r"\boxed{205}", "204").status == "wrong"
    assert score("204", "204").status == "no_box"
    assert score(r"\boxed{}", "204").status == "empty_box"
    assert score(r"\boxed{20", "204").status == "truncated"
    assert score(r"<think>\boxed{204}", "204").status == "unfinished_thinking"
    assert score(r"\boxed{9^{9^{9}}}", "3/4").status == "unparseable"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("", "auto"),
        ("  ", "math"),
        (None, "auto"),
        (r"336^\circ", "aime"),
        ("3/4", "aime"),
        ("\x0crac{1}{2}", "math"),
        (r"\frac{1}{2", "math"),
        ("204", "olympiad"),
        ("9" * 1200, "math"),
        (["204"], "auto"),
        ("He has 2 * 9 = <<2*9=18>>18.\n#### 18", "gsm8k"),
        ("#### 18", "auto"),
        ("He has 2 * 9.\nThat is 18", "math"),
    ],
)
def test_a_bad_gold_masks_the_sample_and_is_reported_at_load(answer, kind):
    result = score(r"\boxed{204}", answer, kind)
    assert (result.reward, result.status) == (None, "bad_gold")
    assert validate_gold(answer, kind)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("204", "aime"),
        ("-3", "amc"),
        (r"\frac{3}{4}", "math"),
        ("18\n", "gsm8k"),
        ("x^2", "auto"),
        ("So it is\n\\boxed{18}.", "math"),
        ("\\begin{pmatrix}\n3 \\\\\n4\n\\end{pmatrix}", "math"),
    ],
)
def test_a_good_gold_verifies_against_itself(answer, kind):
    assert validate_gold(answer, kind) is None


def test_a_worked_solution_as_gold_is_told_how_its_answer_is_taken_out():
    assert 'answer_match: "#### (.+)"' in str(validate_gold("He has 2 * 9.\n#### 18", "gsm8k"))


def test_lenient_mode_reads_a_stated_answer_and_strict_mode_does_not():
    text = "Some steps.\nThe final answer is $204$. "
    assert score(text, "204").status == "no_box"
    assert score(text, "204", lenient=True).correct
    assert score("**Answer:** 204", "204", lenient=True).correct
    assert not score("Answer: 205", "204", lenient=True).correct
    assert not score(r"Answer: 204 so \boxed{205}", "204", lenient=True).correct


def test_equality_of_results_ignores_the_clock():
    assert score(r"\boxed{204}", "204") == score(r"\boxed{204}", "204")


def test_a_batch_gives_one_result_each_in_order():
    items = [(rf"\boxed{{{n}}}", str(n % 3)) for n in range(30)]
    results = score_batch(items)
    assert [r.correct for r in results] == [n == n % 3 for n in range(30)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(PIECES),
        max_size=25,
    ),
    st.sampled_from(["204", r"\frac{3}{4}", "x^2+1", "(1,2)", "1,2", ""]),
    st.sampled_from(["auto", "aime", "math"]),
)
def test_it_never_raises(pieces, answer, kind):
    result = score("".join(pieces), answer, kind)
    assert isinstance(result, Result)
    assert result.reward in (None, 0.0, 1.0)
    assert result.status != "error"


@pytest.mark.parametrize("completion", [None, 204, b"\\boxed{204}", ["x"]])
def test_a_completion_that_is_no_text_scores_0_without_raising(completion):
    assert score(completion, "204").reward == 0.0


def test_importing_the_grader_loads_neither_sympy_nor_any_framework():
    code = (
        "import sys; from sse_rewards import score; score(r'\\boxed{204}', '204');"
        "print([m for m in ('sympy', 'math_verify', 'torch', 'transformers', 'ray', 'sse_rl')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
