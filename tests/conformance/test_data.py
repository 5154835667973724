"""The report's rules about data, one test a rule (report §4.1, §5.1)."""

import json

import numpy as np
import pytest
import torch

from litseek.data import chat
from litseek.data.batch import IGNORE
from litseek.data.corpora import Document, StandardLibrary
from litseek.data.documents import Transform
from litseek.data.packing import collate, pack_isolated
from litseek.data.sources import TextSource
from litseek.data.tokenizer import ASSISTANT, BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, USER, train


@pytest.fixture(scope="module")
def documents():
    return list(StandardLibrary(packages=["json", "email", "logging", "asyncio"]).documents())


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train((d.text for d in documents), vocab_size=512)


def test_4_1_fim_format(documents, tokenizer):
    """<|fim_begin|>pre<|fim_hole|>suf<|fim_end|>mid<|eos_token|>, applied to whole documents before packing."""
    for document, ids in zip(documents, Transform(fim_rate=1.0).encode(documents, tokenizer), strict=True):
        begin, hole, end = (int(np.flatnonzero(ids == tokenizer.control(n))[0]) for n in (FIM_BEGIN, FIM_HOLE, FIM_END))
        assert (ids[0], begin, ids[-1]) == (tokenizer.bos_id, 1, tokenizer.eos_id)
        assert begin < hole < end
        prefix, suffix, middle = ids[2:hole], ids[hole + 1 : end], ids[end + 1 : -1]
        assert tokenizer.decode(np.concatenate([prefix, middle, suffix])) == document.text or any(
            "\ufffd" in tokenizer.decode(p) for p in (prefix, middle, suffix)
        )
        assert sum(int(i) in tokenizer.control_ids.values() for i in ids) == 5


def test_4_1_fim_rate(tokenizer):
    """One document in ten, at the default rate of every text source."""
    rate = TextSource(seq_len=8).transform.fim_rate
    assert rate == 0.1
    many = [Document("", f"document number {n}") for n in range(5000)]
    arranged = sum(int(ids[1]) == tokenizer.control(FIM_BEGIN) for ids in Transform(rate).encode(many, tokenizer))
    assert arranged / len(many) == pytest.approx(0.1, abs=4 * (0.09 / 5000) ** 0.5)


def test_4_1_pretokenizer_joins_punctuation_and_line_breaks(tokenizer):
    """Signs and the line breaks behind them may be one token; words, numbers and other white space stay apart."""
    pieces = [p for p, _ in tokenizer.raw.pre_tokenizer.pre_tokenize_str("f(x):\r\n\n  y = 12345\n# é")]
    assert ["):čĊĊ" in p for p in pieces].count(True) == 1
    assert {"123", "45"} <= set(pieces)
    assert any(len(head) == 1 and len(tail) == 1 for head, tail in tokenizer.joined.values())


def test_4_1_joined_tokens_are_split_at_the_rate(documents, tokenizer):
    """A part of the tokens that join punctuation and line breaks is split in training; the text stays the same."""
    text = "".join(d.text for d in documents)
    ids = tokenizer.encode(text)
    joined = sum(i in tokenizer.joined for i in ids)
    split = tokenizer.split_joined(ids, 0.25, np.random.default_rng(0))
    remaining = sum(int(i) in tokenizer.joined for i in split)
    assert joined > 1000
    assert (joined - remaining) / joined == pytest.approx(0.25, abs=4 * (0.1875 / joined) ** 0.5)
    assert tokenizer.decode(split) == text
    everything = tokenizer.split_joined(ids, 1.0, np.random.default_rng(0))
    breaks = set("\r\n")
    for i in np.unique(everything):
        piece = tokenizer.decode([i])
        assert not (breaks & set(piece) and set(piece) - breaks - set(" \t")), f"{piece!r} still joins both"


def test_4_1_documents_are_packed_without_masks_between_them(documents, tokenizer, tmp_path):
    """Rows run across documents; positions count through and nothing isolates them."""
    path = tokenizer.save(tmp_path)
    source = TextSource(StandardLibrary(packages=["json", "email"]), seq_len=256, tokenizer=str(path))
    source.prepare(tmp_path)
    rows = [source[i] for i in range(200)]
    crossing = [r for r in rows if tokenizer.eos_id in r["tokens"][:-1]]
    assert crossing
    for row in crossing:
        assert "documents" not in row and row["positions"].tolist() == list(range(256))
        ends = (row["tokens"][:-1] == tokenizer.eos_id).nonzero().flatten()
        assert (row["labels"][ends] == tokenizer.bos_id).all(), "the next document's beginning is predicted too"
    assert collate(rows[:2]).documents is None


def test_5_1_samples_are_packed_but_masked_from_one_another(tokenizer):
    """SFT: several samples a row, each with its own document id and positions from 0; none predicts another."""
    talks = [
        [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "yes " * n}]
        for n in range(1, 9)
    ]
    rows = pack_isolated([chat.encode(t, tokenizer) for t in talks], 128, tokenizer.pad_id)
    assert len(rows) < len(talks)
    for row in rows:
        changes = (row["documents"][1:] != row["documents"][:-1]).nonzero().flatten()
        assert len(changes) >= 1
        assert (row["positions"][changes + 1] == 0).all()
        assert (row["labels"][changes][row["labels"][changes] != IGNORE] == tokenizer.eos_id).all()
        starts = row["tokens"] == tokenizer.bos_id
        assert torch.equal(starts, starts & (row["positions"] == 0))


def test_5_1_loss_counts_answers_only(tokenizer):
    """Prompts, system text and padding carry no loss; the answer and its end do."""
    talk = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
    (row,) = pack_isolated([chat.encode(talk, tokenizer)], 64, tokenizer.pad_id)
    scored = row["labels"] != IGNORE
    assert tokenizer.decode(row["labels"][scored], skip_special=False) == f"Because.{EOS}"
    whole = tokenizer.decode([*row["tokens"][: int(scored.nonzero()[-1]) + 1], tokenizer.eos_id], skip_special=False)
    assert whole == f"{BOS}Short.{USER}Why?{ASSISTANT}Because.{EOS}"


def test_6_the_released_control_tokens_bear_our_names():
    """Names of the released tokenizer.json, so that its ids 0, 1, 128800-128804 are found by name."""
    assert json.loads(json.dumps([BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT])) == [
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>",
        "<｜User｜>", "<｜Assistant｜>",
    ]  # fmt: skip
