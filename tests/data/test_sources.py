import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from litseek.data.batch import IGNORE
from litseek.data.sources import FileSource, TextSource, gzip_bits_per_byte, xz_bits_per_byte
from litseek.errors import LitseekError

CONF = Path(__file__).parents[2] / "conf/data"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def source(texts, library, cache):
    def make(seq_len=32, seed=0, where=cache):
        made = TextSource(texts(library), seq_len=seq_len, vocab_size=400)
        made.set_seed(seed)
        made.prepare(where)
        return made

    return make


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_samples_are_a_pure_function_of_seed_and_index(source):
    first = [source()[i] for i in range(40)]
    resumed = source()
    assert all(same(resumed[i], first[i]) for i in reversed(range(40)))
    assert not all(same(source(seed=1)[i], first[i]) for i in range(40))
    assert first[0]["tokens"].shape == (32,) and first[0]["tokens"].dtype == torch.int64


def test_an_epoch_sees_every_token_once_and_the_next_is_cut_elsewhere(source):
    made = source(seq_len=64)
    (stream,) = made.streams.values()
    per_epoch = (len(stream) - 1) // 64
    starts = []
    for epoch in range(2):
        rows = [made[epoch * per_epoch + i]["tokens"].numpy() for i in range(per_epoch)]
        counts = np.bincount(np.concatenate(rows), minlength=400)
        missing = np.bincount(stream, minlength=400) - counts
        assert (missing >= 0).all() and missing.sum() <= 64
        starts.append({r.tobytes() for r in rows})
    assert len(starts[0] & starts[1]) < per_epoch / 10


def test_stages_share_the_token_array_whatever_their_length_and_seed(source, tmp_path):
    source(seq_len=32, where=tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    longer = source(seq_len=512, seed=9, where=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before and len(before) == 2
    assert longer[0]["tokens"].shape == (512,)


def test_validation_scores_the_held_out_text_once(source):
    made = source(seq_len=48)
    rows = made.validation()
    labels = torch.cat([r["labels"] for r in rows])
    text = made.tokenizer.decode(labels[labels != IGNORE])
    assert text.encode() == made.validation_text
    assert made.validation_bytes == len(made.validation_text) > 1000
    assert source(seq_len=100).validation_text == made.validation_text


def test_compressors_measure_bits_per_byte():
    data = Path(__file__).read_bytes() * 5
    assert gzip_bits_per_byte(data) == 8 * len(gzip.compress(data, 9)) / len(data)
    assert 0 < xz_bits_per_byte(data) < gzip_bits_per_byte(data) < 8


def test_a_mixture_keeps_its_weights_and_each_held_out_part(texts, library, tmp_path):
    corpora = {"code": texts(library), "letters": texts(["zqj\n" * 4000, "qzj\n" * 3000])}
    made = TextSource(corpora, weights={"code": 3, "letters": 1}, seq_len=16, vocab_size=300)
    made.prepare(tmp_path)
    decoded = [made.tokenizer.decode(made[i]["tokens"]) for i in range(1024)]
    letters = sum(set(t) <= set("zqj\n") for t in decoded)
    assert letters == pytest.approx(256, abs=3)
    assert made.validation_text.endswith(b"zqj\n") and set(made.validation_text) > set(b"zqj\n")


def test_the_parents_tokenizer_is_used_unless_one_was_named(source, tokenizer, tmp_path, texts, library):
    parent = tokenizer.save(tmp_path / "parent")
    made = TextSource(texts(library), seq_len=8, vocab_size=300)
    made.use_tokenizer(parent)
    made.prepare(tmp_path)
    assert made.tokenizer.digest == tokenizer.digest
    other = source().tokenizer.save(tmp_path / "other")
    named = TextSource(texts(library), seq_len=8, tokenizer=str(other))
    named.use_tokenizer(parent)
    named.prepare(tmp_path)
    assert named.tokenizer.vocab_size == 400


def test_a_corpus_shorter_than_a_row_says_so(texts, tmp_path):
    made = TextSource(texts(["a b c d\n" * 3]), seq_len=4096, vocab_size=270)
    with pytest.raises(LitseekError, match=r"too few for one row of data.seq_len=4096"):
        made.prepare(tmp_path)


def test_settings_that_cannot_work_are_refused_at_once(texts):
    with pytest.raises(ValueError, match=r"data.seq_len=0"):
        TextSource(texts(["x"]), seq_len=0)
    with pytest.raises(ValueError, match=r"data.weights names \['b'\], but data.corpus has \['a'\]"):
        TextSource({"a": texts(["x"])}, weights={"b": 1}, seq_len=8)
    with pytest.raises(ValueError, match=r"data.corpus is empty"):
        TextSource({}, seq_len=8)


def test_samples_are_numbered_from_zero(source):
    with pytest.raises(IndexError):
        source()[-1]


# -- the configs build these sources


def test_the_default_config_reads_the_standard_library(tmp_path):
    config = OmegaConf.load(CONF / "stdlib.yaml")
    config.merge_with({"seq_len": 64, "vocab_size": 300, "corpus": {"packages": ["json"]}})
    made = instantiate(config)
    made.prepare(tmp_path)
    assert made[0]["tokens"].shape == (64,) and "JSON" in made.tokenizer.decode(made.streams["text"])


def test_the_jsonl_config_takes_data_files(tmp_path, library):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in library))
    config = OmegaConf.load(CONF / "jsonl.yaml")
    config.merge_with({"files": [str(tmp_path / "*.jsonl")], "field": "body", "seq_len": 64, "vocab_size": 300})
    made = instantiate(config)
    made.prepare(tmp_path / "cache")
    assert isinstance(made, FileSource) and made[0]["tokens"].shape == (64,)


def test_the_mixture_config_mixes(tmp_path, library):
    (tmp_path / "a.txt").write_text("".join(library))
    config = OmegaConf.load(CONF / "mixture.yaml")
    config.merge_with(
        {
            "corpus": {"library": {"packages": ["json"]}, "files": {"files": str(tmp_path / "a.txt")}},
            "seq_len": 64,
            "vocab_size": 300,
            "weights": {"files": 3},
        }
    )
    made = instantiate(config)
    made.prepare(tmp_path / "cache")
    assert made.weights == {"library": 1, "files": 3} and made[5]["tokens"].shape == (64,)


def test_a_corpus_beside_files_is_refused():
    with pytest.raises(ValueError, match="leave the key, or the preset that sets it, out"):
        FileSource(["a.jsonl"], corpus={"packages": ["json"]}, seq_len=8)
