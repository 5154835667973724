import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Raw
from tokenizers.models import WordLevel

from litseek.data import tokenizer as bpe
from litseek.errors import LitseekError


def test_any_text_survives_the_round_trip(tokenizer):
    @settings(max_examples=150, deadline=None, database=None)
    @given(st.text(max_size=60))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text

    check()


def test_text_that_spells_a_control_token_stays_text(tokenizer):
    text = f"a{bpe.EOS}b{bpe.USER}c"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.control_ids.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eos_id]) == "x"


def test_batches_encode_like_single_texts(tokenizer, library):
    assert tokenizer.encode_batch(library[:5]) == [tokenizer.encode(t) for t in library[:5]]


def test_training_is_deterministic_and_respects_the_size(library, tokenizer):
    again = bpe.train(library, vocab_size=512)
    assert again.digest == tokenizer.digest
    assert again.vocab_size == 512
    assert sorted(again.control_ids) == sorted(bpe.CONTROL)
    with pytest.raises(ValueError, match=r"vocab_size=100 .* 264"):
        bpe.train(library, vocab_size=100)


def test_digits_sets_how_long_a_number_token_may_be():
    texts = ["1234567 " * 50]
    for digits, longest in ((1, 1), (3, 3)):
        trained = bpe.train(texts, vocab_size=300, digits=digits)
        assert max(len(trained.decode([i])) for i in trained.encode("1234567")) == longest


def test_saved_tokenizers_load_from_file_folder_and_gzip(tokenizer, tmp_path):
    file = tokenizer.save(tmp_path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/tokenizer.json.gz").write_bytes(gzip.compress(file.read_bytes()))
    for path in (file, tmp_path, tmp_path / "packed"):
        loaded = bpe.load(path)
        assert loaded.digest == tokenizer.digest
        assert loaded.encode("def f():\n") == tokenizer.encode("def f():\n")


def test_transformers_reads_the_saved_folder(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "for x in range(10):\n\tprint(x)  # 日本語\n"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_only_a_larger_tokenizer_is_refused(tokenizer):
    tokenizer.check_fits(512)
    tokenizer.check_fits(600)
    with pytest.raises(ValueError, match=r"512 tokens, more than model.vocab_size=511"):
        tokenizer.check_fits(511)


def test_missing_broken_and_foreign_tokenizers_say_so(tmp_path):
    with pytest.raises(LitseekError, match=r"no tokenizer.json"):
        bpe.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LitseekError, match="not a tokenizer"):
        bpe.load(tmp_path)
    foreign = bpe.Tokenizer(Raw(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), source="foreign.json")
    with pytest.raises(ValueError, match=r"foreign.json has no token <｜begin"):
        _ = foreign.bos_id


def test_split_joined_keeps_the_text_and_the_order(tokenizer, library):
    assert tokenizer.joined, "the corpus should give at least one joined token"
    ids = tokenizer.encode(library[3])
    for rate in (0.0, 0.5, 1.0):
        split = tokenizer.split_joined(ids, rate, np.random.default_rng(1))
        assert tokenizer.decode(split) == library[3]
        assert np.array_equal(split, tokenizer.split_joined(ids, rate, np.random.default_rng(1)))
    assert tokenizer.split_joined([], 1.0, np.random.default_rng(1)).tolist() == []
