from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from litseek.data.batch import IGNORE
from litseek.data.chat_source import ChatSource
from litseek.data.packing import collate
from litseek.errors import LitseekError

CONF = Path(__file__).parents[2] / "conf/data"


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


SUMS = [talk(f"{a} + {b} =", str(a + b)) for a in range(12) for b in range(12)]
ECHO = [talk(f"say {w}", f"{w} {w}") for w in ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]]


@pytest.fixture
def build(tokenizer, tmp_path):
    path = str(tokenizer.save(tmp_path / "tokenizer"))

    def make(conversations, seq_len=64, seed=0, **options):
        source = ChatSource(conversations, seq_len=seq_len, tokenizer=path, **options)
        source.set_seed(seed)
        source.prepare(tmp_path)
        return source

    return make


def answers_of(source, rows):
    labels = torch.cat([r["labels"] for r in rows])
    return source.tokenizer.decode(labels[labels != IGNORE], skip_special=False).split("<｜end▁of▁sentence｜>")[:-1]


def test_an_epoch_shows_every_conversation_once(build):
    source = build([SUMS, ECHO], validation_fraction=0.1)
    per_epoch = source.rows_per_epoch
    everything = sorted(m[1]["content"] for m in [*SUMS, *ECHO])
    for epoch in range(2):
        rows = [source[epoch * per_epoch + i] for i in range(per_epoch)]
        assert sorted(answers_of(source, [*rows, *source.validation()])) == everything


def test_samples_are_a_pure_function_of_seed_and_index(build):
    first, again = build(SUMS), build(SUMS)
    assert all(torch.equal(first[i]["tokens"], again[i]["tokens"]) for i in reversed(range(100)))
    other = build(SUMS, seed=1)
    assert not all(torch.equal(first[i]["tokens"], other[i]["tokens"]) for i in range(10))


def test_rows_collate_to_an_isolated_micro_batch(build):
    micro = collate([build(SUMS)[i] for i in range(4)])
    assert micro.documents.shape == micro.tokens.shape == (4, 64)
    assert micro.targets == int((micro.labels != IGNORE).sum()) > 0


def test_weights_set_the_share_of_rows(build):
    source = build({"sums": SUMS, "echo": ECHO}, weights={"sums": 1, "echo": 3})
    rows = [source[i] for i in range(1024)]
    echo = sum("say" in source.tokenizer.decode(r["tokens"]) for r in rows)
    assert echo == 768


def test_held_out_answers_are_counted_in_bytes(build):
    source = build(SUMS, validation_fraction=0.2, validation_bytes=20)
    assert "".join(answers_of(source, source.validation())).encode() != b""
    assert sorted("".join(answers_of(source, source.validation()))) == sorted(source.validation_text.decode())
    assert 15 <= source.validation_bytes <= 20


def test_conversations_that_do_not_fit_are_counted_or_refused(build, caplog):
    long = [*SUMS, talk("tell", "word " * 500)]
    source = build(long)
    assert source.dropped == 1 and "1 conversations are longer than data.seq_len=64" in caplog.text
    with pytest.raises(LitseekError, match=r"does not fit data.seq_len=64: 'tell'"):
        build(long, too_long="error")
    with pytest.raises(LitseekError, match="no conversation to train on; 1 were too long"):
        build([talk("tell", "word " * 500)])


def test_bad_conversations_and_settings_are_named(build):
    with pytest.raises(LitseekError, match="without an answer: 'hello'"):
        build([[{"role": "user", "content": "hello"}]])
    with pytest.raises(ValueError, match=r"data.weights names \['a'\]"):
        ChatSource({"b": SUMS}, weights={"a": 1}, seq_len=8)
    with pytest.raises(ValueError, match=r"data.too_long='cut' must be one of drop, error"):
        ChatSource(SUMS, seq_len=8, too_long="cut")


def test_without_a_tokenizer_it_gets_the_one_that_pretraining_trained(tmp_path, monkeypatch):
    from litseek.data import chat_source
    from litseek.data.corpora import StandardLibrary
    from litseek.data.sources import TextSource

    small = lambda: StandardLibrary(packages=["json"])
    monkeypatch.setattr(chat_source, "StandardLibrary", small)
    text = TextSource(small(), seq_len=32, vocab_size=300, validation_bytes=5000)
    text.prepare(tmp_path)
    source = ChatSource(SUMS, seq_len=64, vocab_size=300)
    source.prepare(tmp_path)
    assert source.tokenizer.source == text.tokenizer.source


def test_the_chat_configs_build(tmp_path, tokenizer):
    path = str(tokenizer.save(tmp_path))
    config = OmegaConf.load(CONF / "chat_stdlib.yaml")
    config.merge_with(
        {
            "conversations": {"docstrings": {"packages": ["json", "email"]}},
            "tokenizer": path,
            "seq_len": 256,
            "vocab_size": 512,
        }
    )
    source = instantiate(config)
    source.prepare(tmp_path)
    assert source[0]["tokens"].shape == (256,)
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "response": "a"}\n' * 9)
    config = OmegaConf.load(CONF / "chat_files.yaml")
    config.merge_with(
        {"conversations": {"files": {"files": str(tmp_path / "a.jsonl")}}, "tokenizer": path, "vocab_size": 512}
    )
    source = instantiate(config)
    source.prepare(tmp_path)
    assert source.rows_per_epoch == 1
