import numpy as np
import pytest

from litseek.data.corpora import Document
from litseek.data.documents import PLAIN, Split, SplitCorpus, Transform, tokenized
from litseek.errors import LitseekError


def test_the_split_is_a_property_of_the_text_alone(texts, library):
    split = Split(fraction=0.3)
    whole, half = SplitCorpus(texts(library), split), SplitCorpus(texts(library[::2]), split)
    trained, held = {d.text for d in whole.training()}, {d.text for d in whole.held_out}
    assert trained.isdisjoint(held) and trained | held == set(library)
    assert {d.text for d in half.training()} <= trained and {d.text for d in half.held_out} <= held
    assert 0.1 < len(held) / len(library) < 0.5


def test_held_out_text_is_capped_at_a_line_and_never_trained_on(texts, library):
    split = Split(fraction=0.3, limit=10_000)
    parts = SplitCorpus(texts(library), split)
    scored = "".join(d.text for d in parts.held_out)
    assert 8_000 < len(scored.encode()) <= 10_000 and scored.endswith("\n")
    assert {d.text for d in parts.training()} == {t for t in library if not split.holds_out(Document("", t))}


@pytest.mark.parametrize("count", [1, 2])
def test_few_large_documents_give_their_tail(texts, library, count):
    corpus = texts(["".join(library), "short\n"][:count])
    parts = SplitCorpus(corpus, Split(fraction=0.05))
    (tail,) = parts.held_out
    assert next(iter(parts.training())).text + tail.text == corpus.texts[0]
    assert 0.04 < len(tail.text) / len(corpus.texts[0]) < 0.06
    assert len(list(parts.training())) == count


def test_a_single_line_still_gives_something_to_hold_out(texts):
    parts = SplitCorpus(texts(["word " * 100]), Split(fraction=0.1))
    assert len(parts.held_out[0].text) == 50
    assert "".join(d.text for d in [*parts.training(), *parts.held_out]) == "word " * 100


def test_a_cap_inside_a_character_drops_it(texts):
    assert [d.text for d in Split(0.5, 4).capped([Document("", "aéé")])] == ["aé"]
    assert Split(0.5, 1).capped([Document("", "é")]) == []


def test_an_empty_corpus_is_an_error(texts):
    with pytest.raises(LitseekError, match="The corpus is empty"):
        SplitCorpus(texts([]), Split())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Split(fraction=0.0), "validation_fraction=0.0"),
        (lambda: Split(limit=0), "validation_bytes=0"),
        (lambda: Transform(fim_rate=-0.1), "fim_rate=-0.1"),
        (lambda: Transform(split_rate=2), "split_rate=2"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plain_document_is_bos_text_eos(tokenizer):
    (ids,) = PLAIN.encode([Document("", "x = 1\n")], tokenizer)
    assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("x = 1\n"), tokenizer.eos_id]


def test_draws_depend_on_seed_and_document_only(tokenizer, library):
    docs = [Document("", t) for t in library]
    transform = Transform(fim_rate=0.5, split_rate=0.5, seed=3)
    together = transform.encode(docs, tokenizer)
    alone = [transform.encode([d], tokenizer)[0] for d in docs]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    other = Transform(fim_rate=0.5, split_rate=0.5, seed=4).encode(docs, tokenizer)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(together, other, strict=True))


def test_the_token_file_is_built_once_and_holds_every_document(texts, tokenizer, library, tmp_path):
    corpus, split = texts(library), Split(0.2)
    file = tokenized(tmp_path, corpus, tokenizer, PLAIN, split)
    parts = SplitCorpus(corpus, split)
    expected = np.concatenate(PLAIN.encode(list(parts.training()), tokenizer))
    assert np.array_equal(file.train, expected) and file.train.dtype == np.uint16
    assert file.held_out_text == "".join(d.text for d in parts.held_out).encode()
    assert file.meta["tokens"] == len(expected)

    def never():
        raise AssertionError("it was read again")

    assert tokenized(tmp_path, corpus, tokenizer, PLAIN, split, never).folder == file.folder
