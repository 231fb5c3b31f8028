"""What a problem is asked in: templates in which `{problem}` is the only placeholder."""

from __future__ import annotations

PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."

PROMPTS = ("default", "matharena")


def prompt_template(prompt: str, benchmark: str) -> str:
    """The template that `prompt` stands for on a benchmark: `default`, `matharena` (MathArena's
    instruction, before the problem; on an AIME it names the range of answers), or itself.

    Raises ValueError for a text without `{problem}`.
    """
    if prompt == "default":
        return PROMPT
    if prompt == "matharena":
        ranged = "\nThe answer is an integer between 0 and 999 inclusive."
        instruction = "Put your final answer within \\boxed{}."
        return f"{instruction}{ranged if benchmark.startswith('aime') else ''}\n\n{{problem}}"
    if "{problem}" not in prompt:
        names = " or ".join(PROMPTS)
        raise ValueError(f"the prompt must be {names}, or a text with {{problem}}, not {prompt!r}")
    return prompt
