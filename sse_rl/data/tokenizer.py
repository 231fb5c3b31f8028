"""Tokenizers: the byte-level one of this package, or any of transformers, with a chat template."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sse_rl.errors import UserError
from sse_rl.recipe import Data

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ANSWER = "the answer"
OPENINGS = [f"{TURN_START}{role}\n" for role in ("system", "user", "assistant")]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(data: Data) -> PreTrainedTokenizerBase:
    """The tokenizer that `data` names, with its chat template, an end token and a pad token.

    Raises:
        UserError: it cannot be loaded, or has no chat template or no end token.
    """
    return named_tokenizer(data.tokenizer, data.chat_template, "data.tokenizer")


def named_tokenizer(
    name: str, chat_template: str | None, key: str = "tokenizer"
) -> PreTrainedTokenizerBase:
    """`load_tokenizer` without a recipe; `key` opens its error messages."""
    tokenizer = byte_tokenizer() if name == "bytes" else _pretrained(name, key)
    prefix = key.removesuffix("tokenizer")
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{prefix}chat_template = {chat_template}: {error.strerror}") from None
    if not tokenizer.chat_template:
        raise UserError(
            f"{key} = {name}: it has no chat template; name a Jinja file in {prefix}chat_template"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key} = {name}: it has no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What ends an answer: the end token and, where that is another, the special token that the
    chat template puts behind an assistant's turn, as models of Qwen, Llama 3 and Gemma learned it.

    Raises:
        UserError: there is no end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("data.tokenizer: it has no eos_token, so no answer could ever end")
    ends = [int(tokenizer.eos_token_id)]  # pyright: ignore[reportArgumentType]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError):  # none, or one that takes no such conversation
        return tuple(ends)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    behind = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False).input_ids
    ends += [i for i in behind if i in special and i not in ends][:1]
    return tuple(ends)


def location(source: str) -> dict[str, str]:
    """`from_pretrained`'s arguments for a folder, a hub id, a GGUF file, or a folder with one.

    Raises:
        UserError: the file is not there, or a folder without config.json holds several.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{source}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{source}: holds several GGUF files, name one of {names}")
    if files:
        return {"pretrained_model_name_or_path": source, "gguf_file": files[0].name}
    return {"pretrained_model_name_or_path": source}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """262 tokens: id b is the byte b, then end of turn (the end token), padding, start of turn,
    and the opening of a system, user and assistant turn as one token each, as those who write
    bytes pay for every letter.

    Any text is representable and decodes to itself. A saved folder is a plain tokenizer.json.
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, *OPENINGS],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a vocabulary (GPT-2's map)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _pretrained(name: str, key: str) -> PreTrainedTokenizerBase:
    place = location(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        if "gguf_file" in place:
            file = Path(place["pretrained_model_name_or_path"]) / place["gguf_file"]
            _name_special_tokens(tokenizer, file)
        return tokenizer
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key} = {name}: cannot be loaded: {reason}") from None


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Which token begins, ends, pads: as the GGUF file says. transformers 5.16 and 5.17 take the
    token that begins a turn for the one that ends it, and answers would go on past their end."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        field = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if field is not None:
            token = tokenizer.convert_ids_to_tokens(int(field.contents()))
            setattr(tokenizer, f"{ours}_token", token)
