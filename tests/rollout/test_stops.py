import numpy as np
import pytest

from sse_rl.rollout.stops import ended_by


def decode(tokens: list[int]) -> str:
    """Bytes; tokens above 255 have no text."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def first_end(tokens: list[int], stops: tuple[str, ...]) -> tuple[int, str] | None:
    for count in range(1, len(tokens) + 1):
        if (stop := ended_by(np.array(tokens[:count]), stops, decode)) is not None:
            return count, stop
    return None


def test_a_stop_string_is_found_at_the_token_that_completes_it():
    assert first_end(list(b"so the answer is 42. Done"), (". D", "Done")) == (22, ". D")


def test_the_first_of_the_list_wins():
    assert first_end(list(b"abc"), ("bc", "abc")) == (3, "bc")


def test_text_without_it_goes_on():
    assert first_end(list(b"nothing here"), ("</answer>",)) is None


def test_characters_of_several_bytes_may_be_cut_by_the_window():
    text = "日本語の答え。終わり"
    assert first_end(list(text.encode()), ("。終",)) == (len("日本語の答え。終".encode()), "。終")


def test_tokens_without_text_do_not_hide_it():
    assert first_end([ord("a"), *[300] * 50, ord("b")], ("ab",)) == (52, "ab")


@pytest.mark.parametrize("length", [10, 1000])
def test_only_a_tail_is_decoded(length: int):
    seen = []

    def watch(tokens: list[int]) -> str:
        seen.append(len(tokens))
        return decode(tokens)

    ended_by(np.full(length, ord("x")), ("stop",), watch)
    assert max(seen) <= 10
