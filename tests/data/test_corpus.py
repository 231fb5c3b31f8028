"""Text as packed rows: what a document becomes, how rows are cut and dealt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sse_rl.data.corpus import PackedText, corpus_name, read_corpus
from sse_rl.data.tokenizer import byte_tokenizer
from sse_rl.errors import UserError
from sse_rl.recipe import Corpus, Data, Source

TOKENIZER = byte_tokenizer()
DATA = Data(train=Source(task="chain_sum"), prompt_template="{problem}")
DOCUMENTS = [np.arange(n) for n in (5, 4, 7, 2)]


def corpus(tmp_path: Path, rows: list[dict], **keys: str) -> Corpus:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus.model_validate({"path": str(path), **keys})


def shown(of: Corpus) -> list[str]:
    return [TOKENIZER.decode(ids) for ids in read_corpus(of, TOKENIZER, DATA)]


def test_rows_are_full_and_sequences_end_where_documents_do():
    text = PackedText(DOCUMENTS, max_length=3, seed=0)
    rows = text.in_order(10**6)
    assert len(rows) == len(text) == 6
    assert all(len(row.tokens) == sum(row.lengths) == 3 for row in rows)
    stream = np.concatenate([row.tokens for row in rows])
    cuts = np.cumsum([n for row in rows for n in row.lengths])[:-1]
    begins = {cut for cut in cuts if stream[cut] == 0}
    # three documents begin inside, and each cut is such a beginning or a row's end
    assert len(begins) == 3 and set(cuts) == begins | {3, 6, 9, 12, 15}


def test_each_epoch_deals_every_row_once_and_any_batch_can_be_asked_for():
    text = PackedText(DOCUMENTS, max_length=3, seed=1)
    rows = sorted(tuple(row.tokens) for row in text.in_order(10**6))
    epochs = [[tuple(text.batch(i, 1).tokens) for i in range(e, e + 6)] for e in (0, 6)]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert epochs[0] != epochs[1]
    pair = text.batch(1, 2)
    assert tuple(pair.tokens) == epochs[0][2] + epochs[0][3]


def test_text_that_fills_no_row_is_refused():
    with pytest.raises(UserError, match=r"distill\.max_length = 64: all text together has 18"):
        PackedText(DOCUMENTS, max_length=64, seed=0)


def test_a_column_of_text_ends_each_document(tmp_path: Path):
    of = corpus(tmp_path, [{"story": "Once."}, {"story": "Twice."}], text="story")
    assert shown(of) == ["Once.<|im_end|>", "Twice.<|im_end|>"]
    assert corpus_name(of) == "text.story"


def test_a_column_of_messages_goes_through_the_chat_template(tmp_path: Path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert shown(corpus(tmp_path, [{"messages": turns}], text="messages")) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    ]


def test_problems_are_written_as_the_cold_start_teaches_them(tmp_path: Path):
    of = corpus(tmp_path, [{"problem": "1+1?", "answer": "2", "solution": "Two."}])
    assert shown(of) == [
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nTwo.\n\\boxed{2}<|im_end|>"
    ]


def test_a_row_without_text_is_named(tmp_path: Path):
    of = corpus(tmp_path, [{"story": "Once."}, {"story": " "}], text="story")
    with pytest.raises(UserError, match="row 2: story is ' ', expected text"):
        read_corpus(of, TOKENIZER, DATA)
    with pytest.raises(UserError, match="row 1: no column 'tale'"):
        read_corpus(of.model_copy(update={"text": "tale"}), TOKENIZER, DATA)
