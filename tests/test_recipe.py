"""Recipes: what is read, what is refused, and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from sse_rl.errors import UserError
from sse_rl.recipe import Recipe
from sse_rl.recipe_io import describe, differences, load_recipe, parse_recipe, resolve

MINIMAL = """
name: tiny
model: {path: somewhere}
data: {train: {task: chain_sum}}
grpo: {max_steps: 3}
"""
RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_loads(path: Path):
    assert load_recipe(path).name


def test_a_number_in_scientific_notation_is_a_number():
    for text in ("1e-6", "1E-6", "1.0e-6", ".000001"):
        recipe = parse_recipe(MINIMAL, [f"grpo.learning_rate={text}"])
        assert recipe.grpo and recipe.grpo.learning_rate == 1e-6


def test_no_and_on_are_words():
    recipe = parse_recipe(MINIMAL, ["rollout.stop=[no, on, yes, off]"])
    assert recipe.rollout.stop == ["no", "on", "yes", "off"]
    assert "grpo.routing_replay = 'no': expected a boolean" in refusal(
        MINIMAL, "grpo.routing_replay=no"
    )


def test_a_leading_zero_does_not_make_a_number_octal():
    recipe = parse_recipe(MINIMAL, ["seed=010"])
    assert recipe.seed == 10


def test_a_resolved_recipe_reads_back_equal():
    recipe = parse_recipe(
        MINIMAL,
        ["data.system_prompt='1e-6'", "data.prompt_template='a: {problem}\n\n b'", "seed=7"],
    )
    text = resolve(recipe)
    assert parse_recipe(text) == recipe
    assert resolve(parse_recipe(text)) == text


def test_a_misspelt_key_is_refused_with_the_right_one():
    message = refusal(MINIMAL, "grpo.lerning_rate=1e-6")
    assert message == "recipe: grpo.lerning_rate: unknown key; did you mean grpo.learning_rate?"


def test_a_key_of_another_section_is_suggested_there():
    message = refusal(MINIMAL, "grpo.state_dtype=float32")
    assert message.endswith("did you mean rollout.state_dtype?")


def test_a_misspelt_section_is_refused_with_the_right_one():
    assert refusal(MINIMAL, "rolout.num_workers=2").endswith("did you mean rollout?")


def test_a_wrong_type_names_key_value_and_expectation():
    assert refusal(MINIMAL, "grpo.max_steps=many") == (
        "recipe: grpo.max_steps = 'many': expected an integer"
    )
    assert "grpo.learning_rate = '1e-6': expected a number" in refusal(
        MINIMAL, "grpo.learning_rate='1e-6'"
    )
    assert "grpo.temperature = 0: expected greater than 0" in refusal(MINIMAL, "grpo.temperature=0")
    assert "finite" in refusal(MINIMAL, "grpo.learning_rate=.nan")


def test_every_fault_of_a_recipe_is_reported():
    message = refusal(MINIMAL, "grpo.lr=1", "seed=-1")
    assert "grpo.lr" in message and "seed" in message


def test_a_missing_key_is_named():
    assert "grpo.max_steps: missing" in refusal(MINIMAL, "grpo={}")


def test_a_key_given_twice_is_refused_with_its_line():
    assert refusal(MINIMAL + "seed: 1\nseed: 2\n") == (
        "recipe, line 7, column 1: key 'seed' is given twice"
    )


def test_broken_yaml_is_refused_with_its_line():
    assert "line 2" in refusal("name: x\n  model: {")


def test_a_group_of_one_is_refused():
    assert "num_generations = 1" in refusal(MINIMAL, "grpo.num_generations=1")


def test_cispo_without_its_cap_is_refused():
    assert "epsilon_high" in refusal(MINIMAL, "grpo.loss_type=cispo")


def test_exact_logprobs_want_equal_threads():
    message = refusal(MINIMAL, "grpo.exact_logprobs=true", "rollout.num_threads=2")
    assert "cluster.learner_threads must be given and equal, got 2, None" in message


def test_shared_prompts_and_exact_logprobs_are_refused_together():
    message = refusal(MINIMAL, "grpo.exact_logprobs=true", "grpo.share_prompts=true")
    assert "share_prompts with exact_logprobs" in message


def test_two_origins_of_a_model_are_refused():
    wanted = "exactly one of model.path, model.config, model.convert"
    assert wanted in refusal(MINIMAL, "model.config={hidden_size: 32}")


def test_a_misspelt_key_of_the_model_is_refused():
    message = refusal(MINIMAL, "model={config: {hiden_size: 32}}")
    assert message.endswith("did you mean model.config.hidden_size?")


def test_a_wrong_type_in_the_model_is_refused():
    message = refusal(MINIMAL, "model={config: {hidden_size: '32'}}")
    assert message == "recipe: model.config.hidden_size = '32': expected an integer"


def test_lengths_above_the_context_are_refused():
    message = refusal(MINIMAL, "model={config: {max_position_embeddings: 1500}}")
    assert "data.max_prompt_length + grpo.max_completion_length = 1536" in message
    assert "1500" in message


def test_overrides_reach_into_lists_and_absent_sections():
    recipe = parse_recipe(
        MINIMAL,
        [
            "rewards.components=[{name: accuracy}, {name: boxed}]",
            "rewards.components.1.weight=0.1",
            "data.train.task_args.max_terms=3",
            "sft.max_steps=5",
        ],
    )
    assert recipe.rewards.components[1].weight == 0.1
    assert recipe.data.train.task_args == {"max_terms": 3}
    assert recipe.sft and recipe.sft.max_steps == 5


@pytest.mark.parametrize(
    "override",
    ["grpo.max_steps", "=3", "grpo..x=1", "name.x=1", "seed={"],
)
def test_a_bad_override_is_refused_with_its_text(override: str):
    assert refusal(MINIMAL, override).startswith(f"--set {override}")


def test_an_override_outside_a_list_is_refused():
    message = refusal(MINIMAL, "rollout.stop=[a]", "rollout.stop.1=b")
    assert "rollout.stop.1: rollout.stop is a list of 1" in message


def test_a_difference_is_a_dotted_key_and_both_values():
    a = parse_recipe(MINIMAL)

    def first(override: str) -> tuple:
        return next(differences(a, parse_recipe(MINIMAL, [override])))

    assert list(differences(a, a)) == []
    assert first("grpo.epsilon=0.3") == ("grpo.epsilon", 0.2, 0.3)
    named = first("rewards.components=[{name: x}]")
    assert named == ("rewards.components.0.name", "accuracy", "x")
    assert first("sft.max_steps=1")[:2] == ("sft", None)


def test_a_missing_file_is_one_message(tmp_path: Path):
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_the_schema_lists_every_section():
    keys = [key for key, *_ in describe()]
    assert {key.split(".")[0] for key in keys} == set(Recipe.model_fields)
    assert len(keys) == len(set(keys))
