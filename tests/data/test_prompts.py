"""Prompts: the chat template up to the answer, one problem an index, the parent's tokenizer."""

import pytest

from litseek.data import chat
from litseek.data import tokenizer as bpe
from litseek.data.arithmetic import Arithmetic
from litseek.data.prompts import PromptSource

OPTIONS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    bpe.train(["1 + 2 - 3 = 0\nAnswer: 4"], vocab_size=264, digits=1).save(path)
    return path


def make(folder, **keys) -> PromptSource:
    source = PromptSource(Arithmetic("grpo", options=OPTIONS), seq_len=64, tokenizer=str(folder), **keys)
    source.prepare(folder)
    return source


def test_a_prompt_ends_where_the_assistant_begins(folder):
    source = make(folder)
    prompt = source[3]
    assert prompt.ids[0] == source.tokenizer.bos_id and prompt.ids[-1] == source.tokenizer.assistant_id
    assert source.tokenizer.decode(prompt.ids) == prompt.problem.prompt
    whole = chat.encode(prompt.problem.conversation(), source.tokenizer).ids
    assert whole[: len(prompt.ids)] == prompt.ids and whole[-1] == source.tokenizer.eos_id


def test_order_is_a_function_of_the_seed(folder):
    one, two = make(folder), make(folder)
    two.set_seed(1)
    assert [one[i].ids for i in range(10)] != [two[i].ids for i in range(10)]
    two.set_seed(0)
    assert [one[i].ids for i in range(10)] == [two[i].ids for i in range(10)]


def test_the_parents_tokenizer_is_taken_unless_one_was_named(folder, tmp_path):
    named = make(folder)
    named.use_tokenizer(tmp_path / "other")
    assert named.tokenizer_spec.path == str(folder)
    free = PromptSource(Arithmetic("grpo", options=OPTIONS), seq_len=64)
    free.use_tokenizer(folder)
    free.prepare(tmp_path)
    assert free[0].ids == named[0].ids


def test_mistakes_are_named(folder):
    with pytest.raises(ValueError, match=r"data\.seq_len=1 must"):
        PromptSource(Arithmetic("grpo"), seq_len=1)
    with pytest.raises(IndexError, match="prompt -1"):
        make(folder)[-1]
