"""The part of a completion that may hold the answer: this turn, after the thinking."""

from __future__ import annotations

from typing import NamedTuple

TURN_ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
)
TURN_STARTS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<｜User｜>")


class Zone(NamedTuple):
    text: str
    unfinished: bool
    """A `<think>` was opened and never closed."""


def answer_zone(completion: str) -> Zone:
    """Cut at the first end-of-turn token, or at a new turn that leaked in without one, then keep
    what follows the last `</think>`. Linear in the length of the completion."""
    end = len(completion)
    if "<" in completion:
        for token in TURN_ENDS:
            found = completion.find(token, 0, end)
            end = end if found < 0 else found
        for token in TURN_STARTS:
            found = completion.find(token, 0, end)
            if found > 0 and not completion[:found].isspace():
                end = found
        close = completion.rfind("</think>", 0, end)
        if completion.rfind("<think>", 0, end) > close:
            return Zone("", unfinished=True)
        if close >= 0:
            return Zone(completion[close + len("</think>") : end], unfinished=False)
    return Zone(completion[:end], unfinished=False)
