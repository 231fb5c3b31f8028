"""`generate()` through the cache gives what recomputing everything gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

PROMPT_LENGTHS = (61, 5, 1, 30)


@pytest.fixture
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 50, (n,), generator=generator) for n in PROMPT_LENGTHS]


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    pad = torch.nn.functional.pad
    return {
        "input_ids": torch.stack([pad(p, (width - len(p), 0)) for p in prompts]),
        "attention_mask": torch.stack(
            [pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts]
        ),
    }


def test_greedy_generation_equals_a_loop_over_full_forwards(model, prompts):
    with torch.no_grad():
        expected = prompts[0]
        for _ in range(10):
            token = model(expected[None], use_cache=False).logits[0, -1].argmax()
            expected = torch.cat((expected, token[None]))
    out = model.generate(
        prompts[0][None],
        attention_mask=torch.ones(1, len(prompts[0]), dtype=torch.int64),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(out[0], expected)


def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(model, prompts):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(**left_padded(prompts), **options)[:, -8:]
    for row, prompt in enumerate(prompts):
        assert torch.equal(
            model.generate(**left_padded([prompt]), **options)[0, -8:], together[row]
        )


def test_beam_search_and_sampling_give_the_same_with_and_without_the_cache(gla_model, prompts):
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 10, "num_return_sequences": 2},
    ):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(4)
            results.append(
                gla_model.generate(
                    **left_padded(prompts),
                    **options,
                    max_new_tokens=8,
                    use_cache=use_cache,
                    eos_token_id=None,
                )
            )
        assert torch.equal(*results)


def test_a_cache_is_continued_by_a_later_call(gla_model, prompts):
    tokens = prompts[0][None]
    with torch.no_grad():
        first = gla_model(tokens[:, :20])
        second = gla_model(tokens[:, 20:], past_key_values=first.past_key_values)
        full = gla_model(tokens, use_cache=False)
    assert second.past_key_values.get_seq_length() == tokens.shape[1]
    assert (second.logits - full.logits[:, 20:]).abs().max() < 1e-4


def test_logits_to_keep_gives_the_last_or_the_named_positions(gla_model, prompts):
    tokens = prompts[0][None]
    with torch.no_grad():
        full = gla_model(tokens).logits
        assert torch.allclose(gla_model(tokens, logits_to_keep=3).logits, full[:, -3:], atol=1e-5)
        at = torch.tensor([4, 0])
        assert torch.allclose(gla_model(tokens, logits_to_keep=at).logits, full[:, at], atol=1e-5)


def test_a_cache_is_refused_where_gradients_are_wanted(gla_model, prompts):
    with pytest.raises(ValueError, match="use_cache"):
        gla_model(prompts[0][None], use_cache=True)
