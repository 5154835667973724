"""Accuracy: a model that always answers right scores 1, ranks share the problems, sampling repeats."""

import pytest
import torch

from litseek.data import tokenizer as bpe
from litseek.data.arithmetic import Arithmetic
from litseek.inference.engine import Engine
from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import build
from litseek.rl import evaluate
from litseek.rl.evaluate import Accuracy

OPTIONS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(["1 + 2 - 3 = 0\nAnswer: 4"], vocab_size=264, digits=1)


@pytest.fixture(scope="module")
def model():
    cfg = DeepSeekV3Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_nextn_predict_layers=0,
        num_attention_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=64,
    )
    return build(cfg)


class Parrot:
    """An engine that gives the worked solution of every problem, but no end to each fourth."""

    solutions: dict[tuple[int, ...], list[int]] = {}

    def __init__(self, model):
        pass

    def generate(self, prompts, sampling, max_batch, first):
        ids = [self.solutions[tuple(p)] for p in prompts]
        return Found(ids, [(first + n) % 4 != 3 for n in range(len(ids))])


class Found:
    def __init__(self, ids, stopped):
        self.ids, self.stopped = ids, torch.tensor(stopped)
        self.lengths = torch.tensor([len(i) for i in ids])

    def lists(self):
        return self.ids


def test_right_answers_count_and_unfinished_ones_do_not(tokenizer, model):
    accuracy = Accuracy(Arithmetic("eval", options=OPTIONS), count=40)
    for problem in accuracy.problems:
        ids = tuple(evaluate.encode_problem(problem, tokenizer).ids)
        Parrot.solutions[ids] = [*tokenizer.encode(problem.solution), tokenizer.eos_id]
    parrot = Parrot(model)
    metrics = accuracy(parrot, tokenizer).metrics()
    assert metrics["eval/problems"] == 40 and metrics["eval/accuracy"] == 0.75 == metrics["eval/finished"]
    parts = [accuracy(parrot, tokenizer, rank, 3) for rank in range(3)]
    assert torch.equal(sum(part.sums for part in parts), accuracy(parrot, tokenizer).sums)
    assert parts[0].samples[0]["correct"] == 1.0 and not parts[1].samples


def test_sampling_repeats_and_does_not_depend_on_how_ranks_share(tokenizer, model):
    accuracy = Accuracy(Arithmetic("eval", options=OPTIONS), count=12, max_tokens=8, samples=12)
    engine = Engine(model)
    one, two = accuracy(engine, tokenizer), accuracy(engine, tokenizer)
    assert one.samples == two.samples and torch.equal(one.sums, two.sums)
    half = accuracy(engine, tokenizer, 1, 2)
    assert float(half.sums[3]) == pytest.approx(float(one.sums[3]) - float(accuracy(engine, tokenizer, 0, 2).sums[3]))


def test_only_the_held_out_split_is_judged():
    with pytest.raises(ValueError, match="only 'eval' is held out"):
        Accuracy(Arithmetic("grpo", options=OPTIONS))
