import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from litseek.data import streaming
from litseek.data.corpora import Files, HubDataset
from litseek.data.documents import Split, Transform
from litseek.data.streaming import StreamingTextSource
from litseek.errors import LitseekError

CONF = Path(__file__).parents[2] / "conf/data"


@pytest.fixture(scope="module")
def shards(tmp_path_factory, library):
    folder = tmp_path_factory.mktemp("shards")
    for n in range(3):
        lines = [json.dumps({"text": t[:1500]}) + "\n" for t in library[n::3] if t.strip()]
        (folder / f"{n}.jsonl").write_text("".join(lines))
    return folder


CORPORA = {
    "files": lambda folder: Files(str(folder / "*.jsonl")),
    "datasets streaming": lambda folder: HubDataset("json", data_files=str(folder / "*.jsonl")),
    "datasets on disk": lambda folder: HubDataset("json", data_files=str(folder / "*.jsonl"), streaming=False),
}


def make(corpus, cache, seed=0, **options):
    options = {"seq_len": 32, "vocab_size": 300, "shuffle_rows": 16, "validation_fraction": 0.2} | options
    source = StreamingTextSource(corpus, **options)
    source.set_seed(seed)
    source.prepare(cache)
    return source


@pytest.mark.parametrize("kind", CORPORA)
def test_resuming_repeats_and_loses_nothing(kind, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "NOTE_TOKENS", 1)
    corpus = CORPORA[kind](shards)
    whole = make(corpus, tmp_path / "a")
    rows = [whole[i]["tokens"] for i in range(3400)]  # more than two epochs
    assert whole.packers["text"]._reader.epoch >= 2

    reads = []
    take = streaming.Reader.take
    monkeypatch.setattr(streaming.Reader, "take", lambda *a: reads.append(1) or take(*a))
    resumed = make(CORPORA[kind](shards), tmp_path / "a")
    assert torch.equal(resumed[1700]["tokens"], rows[1700])
    assert len(reads) < 12, "it went to the note, not through the data"
    assert all(torch.equal(resumed[i]["tokens"], rows[i]) for i in range(1700, 1800))
    without_notes = make(CORPORA[kind](shards), tmp_path / "b")
    assert torch.equal(without_notes[900]["tokens"], rows[900])
    assert torch.equal(without_notes[3]["tokens"], rows[3]), "going back works too"


def test_the_stream_is_the_documents_one_after_another(shards, tmp_path):
    source = make(Files(str(shards / "*.jsonl")), tmp_path, fim_rate=0.0, split_rate=0.0, shuffle_rows=8)
    packer = source.packers["text"]
    stream = torch.cat([torch.from_numpy(packer.block(b)[:-1]) for b in range(5)])
    split, plain = Split(0.2), Transform(0.0, 0.0)
    documents = [d for d in packer.corpus.documents() if not split.holds_out(d)]
    expected = torch.cat([torch.from_numpy(a) for a in plain.encode(documents, source.tokenizer)])
    assert torch.equal(stream, expected[: len(stream)])
    rows = torch.stack([source[i]["tokens"] for i in range(8)])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, stream[: 8 * 32].view(8, 32).tolist()))


def test_each_epoch_draws_its_own_fim(shards, tmp_path):
    source = make(Files(str(shards / "0.jsonl")), tmp_path, fim_rate=1.0, shuffle_rows=1)
    reader = streaming.Reader(source.corpora["text"])
    first = reader.take(1, Split(0.2))
    a, b = (source.transform.encode(first, source.tokenizer, epoch)[0] for epoch in (0, 1))
    assert len(a) == len(b) or a.tolist() != b.tolist()
    assert a.tolist() != b.tolist()


def test_the_seed_orders_the_rows(shards, tmp_path):
    rows = [
        [make(Files(str(shards / "*.jsonl")), tmp_path, seed=s)[i]["tokens"].tolist() for i in range(16)]
        for s in (0, 1)
    ]
    assert rows[0] != rows[1] and sorted(rows[0]) == sorted(rows[1])


def test_held_out_documents_are_scored_and_never_streamed(shards, tmp_path):
    source = make(Files(str(shards / "*.jsonl")), tmp_path, fim_rate=0.0)
    held = [d.text for d in source.corpora["text"].documents() if Split(0.2).holds_out(d)]
    assert sorted(source.validation_text.decode()) == sorted("".join(held))
    streamed = source.tokenizer.decode(torch.cat([torch.from_numpy(source.packers["text"].block(b)) for b in range(9)]))
    assert not any(text in streamed for text in held if len(text) > 200)


def test_streams_mix_by_weight(shards, tmp_path, texts):
    corpora = {"code": Files(str(shards / "*.jsonl")), "letters": texts([f"zqj{'z' * n}\n" * 60 for n in range(40)])}
    source = make(corpora, tmp_path, weights={"code": 1, "letters": 1}, seq_len=8)
    decoded = [source.tokenizer.decode(source[i]["tokens"]) for i in range(1024)]
    assert sum(set(t) <= set("zqj\n") for t in decoded) == pytest.approx(512, abs=10)


def test_bad_streams_say_what_is_wrong(shards, tmp_path, texts):
    with pytest.raises(ValueError, match=r"data.weights is needed"):
        StreamingTextSource({"a": texts(["x"]), "b": texts(["y"])}, seq_len=8)
    with pytest.raises(ValueError, match=r"data.shuffle_rows=0"):
        StreamingTextSource(texts(["x"]), seq_len=8, shuffle_rows=0)
    with pytest.raises(LitseekError, match="validation_fraction"):
        make(texts(["only one document\n"]), tmp_path, validation_fraction=1e-9)
    with pytest.raises(LitseekError, match="The corpus is empty"):
        make(texts([]), tmp_path)


def test_the_streaming_configs_build(shards, tmp_path):
    for name, corpus in (
        ("files_streaming", {"files": str(shards / "*.jsonl")}),
        ("hub", {"path": "json", "data_files": str(shards / "0.jsonl")}),
    ):
        config = OmegaConf.load(CONF / f"{name}.yaml")
        config.merge_with(
            {"corpus": corpus, "seq_len": 16, "vocab_size": 300, "shuffle_rows": 4, "validation_fraction": 0.2}
        )
        source = instantiate(config)
        source.prepare(tmp_path)
        assert source[0]["tokens"].shape == (16,)
