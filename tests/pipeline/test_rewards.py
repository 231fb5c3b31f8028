"""Reward components: what a recipe may name, and what a function of the user's own may give."""

import pytest

from sse_rl.errors import UserError
from sse_rl.pipeline.rewards import Sample, call, check_components
from sse_rl.recipe import Reward

SAMPLES = [Sample("1 + 1", "2", [50], "2", "auto"), Sample("1 + 2", "4", [52], "3", "auto")]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("acuracy", {}, "unknown reward 'acuracy'"),
        ("no_such_module:f", {}, "no_such_module"),
        ("math:no_such_function", {}, "no_such_function"),
        ("math:pi", {}, "is no function"),
        ("json:dumps", {"colour": 1}, "is called with"),
        ("accuracy", {"x": 1}, "takes none"),
        ("think_format", {"x": 1}, "takes none"),
        ("repetition", {"x": 1}, "repetition"),
    ],
)
def test_a_component_that_cannot_be_had_is_refused_by_name(name, args, message):
    with pytest.raises(UserError, match=message):
        check_components([Reward(name=name, args=args)])


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
