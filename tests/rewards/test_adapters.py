"""TRL's and verl's signatures, and the rows of `sse-rl grade`."""

import pytest
from sse_rewards import accuracy_reward, compute_score
from sse_rewards.grade import grade_rows, summarize

RIGHT, WRONG = r"so \boxed{204}", r"so \boxed{205}"


def test_trl_gets_one_number_a_completion_and_none_for_a_bad_gold():
    assert accuracy_reward([RIGHT, WRONG, RIGHT], ["204", "204", ""]) == [1.0, 0.0, None]


def test_trl_message_lists_are_graded_by_their_last_assistant_message():
    messages = [{"role": "assistant", "content": WRONG}, {"role": "assistant", "content": RIGHT}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": RIGHT}]}]
    assert accuracy_reward([messages, parts], ["204", "204"]) == [1.0, 1.0]


def test_answer_wins_over_a_worked_solution_and_other_columns_are_ignored():
    rewards = accuracy_reward(
        completions=[RIGHT],
        solution=["First, 100 + 104 = <<100+104=204>>204"],
        answer=["204"],
        prompts=["?"],
        completion_ids=[[1]],
        trainer_state=None,
    )
    assert rewards == [1.0]


def test_a_missing_or_short_column_is_named():
    with pytest.raises(ValueError, match="answer"):
        accuracy_reward([RIGHT])
    with pytest.raises(ValueError, match="2 completions, 1 answers"):
        accuracy_reward([RIGHT, WRONG], ["204"])


def test_verl_takes_the_kind_from_the_data_source():
    assert compute_score("math-ai/aime25", RIGHT, "204") == 1.0
    assert compute_score("openai/gsm8k", r"\boxed{\$18}", "18") == 1.0
    assert compute_score("HuggingFaceH4/MATH-500", r"\boxed{\frac{408}{2}}", "204") == 1.0
    assert compute_score("math_dapo", RIGHT, "", {"index": 3}) == 0.0


def test_rows_are_graded_in_order_and_summed_up():
    rows = [
        {"id": n, "completion": text, "answer": answer}
        for n, (text, answer) in enumerate([(RIGHT, "204"), (WRONG, "204"), ("", "1"), ("", "")])
    ]
    graded = list(grade_rows(rows, kind="aime"))
    assert [(row["id"], row["reward"]) for row in graded] == [
        (0, 1.0),
        (1, 0.0),
        (2, 0.0),
        (3, None),
    ]
    summary = summarize(graded)
    assert (summary["total"], summary["graded"], summary["correct"]) == (4, 3, 1)
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert summary["bad_gold_rows"] == [4]


def test_a_row_without_an_answer_is_named():
    with pytest.raises(ValueError, match="row 2 has no 'answer'; its keys are: completion"):
        list(grade_rows([{"completion": RIGHT, "answer": "1"}, {"completion": RIGHT}]))
