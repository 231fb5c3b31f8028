"""Reward components: what a recipe may name, and what a function of the user's own may give."""

import pytest

from sse_rl.errors import UserError
from sse_rl.pipeline.rewards import (
    Sample,
    call,
    check_components,
    reward_function,
)
from sse_rl.recipe import Reward

SAMPLES = [Sample("1 + 1", "2", [50], "2", "auto"), Sample("1 + 2", "4", [52], "3", "auto")]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("acuracy", {}, "unknown reward 'acuracy'"),
        ("no_such_module:f", {}, "no_such_module"),
        ("math:no_such_function", {}, "no_such_function"),
        ("math:pi", {}, "is no function"),
        ("nowhere/mine.py:f", {}, "nowhere/mine.py cannot be read"),
        ("json:dumps", {"colour": 1}, "is called with"),
        ("accuracy", {"x": 1}, "takes none"),
        ("think_format", {"x": 1}, "takes none"),
        ("repetition", {"x": 1}, "repetition"),
    ],
)
def test_a_component_that_cannot_be_had_is_refused_by_name(name, args, message):
    with pytest.raises(UserError, match=message):
        check_components([Reward(name=name, args=args)])


MINE = """\ufefffrom dataclasses import dataclass
from pathlib import Path

NAME = Path(__file__).name

@dataclass
class Counted:
    letters: int

def length(completions, scale=1.0, **columns):
    return [scale * Counted(len(c[0]["content"])).letters for c in completions]
"""


def test_a_function_of_a_file_is_read_from_its_text(tmp_path):
    file = tmp_path / "mine.py"
    reward = Reward(name=f"{file}:length", args={"scale": 0.5})
    file.write_text(MINE, encoding="utf-8")
    sources = check_components([reward, Reward(name="accuracy")])
    file.unlink()  # as on another machine
    function = reward_function(reward, sources[reward.name])
    assert call(reward.name, function, SAMPLES) == [0.5, 0.5]


def test_a_file_that_is_no_python_is_refused_by_name(tmp_path):
    (tmp_path / "mine.py").write_text("def length(:")
    with pytest.raises(UserError, match=r"mine.py:length' cannot be imported: SyntaxError"):
        check_components([Reward(name=f"{tmp_path / 'mine.py'}:length")])


def test_a_component_may_stand_once_only():
    with pytest.raises(UserError, match="'boxed' is there twice"):
        check_components([Reward(name="boxed"), Reward(name="boxed", weight=2.0)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "gave 1 values for 2"),
        ([1.0, float("nan")], "gave nan for '4'"),
        (["a", 1], "raised ValueError"),
        (None, "raised TypeError"),
    ],
)
def test_what_is_no_reward_is_an_error_that_names_the_component(values, message):
    with pytest.raises(UserError, match=message):
        call("mine", lambda **_: values, SAMPLES)


def test_none_abstains():
    assert call("mine", lambda **_: [None, 1], SAMPLES) == [None, 1.0]
