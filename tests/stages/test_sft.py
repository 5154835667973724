"""SFT: answers only, isolation, the parent's rotary settings, accuracy before and after."""

import json

import pytest
import torch

from litseek.data.batch import IGNORE
from litseek.parallel.checkpoint import load_weights, resolve_checkpoint
from litseek.stages.context import Context
from litseek.stages.pretrain import Pretrain
from litseek.stages.sft import Sft
from tests.stages.fitting import fit
from tests.toy import SEQ, ToySource, toy_stage

YARN = {"factor": 4.0, "original_max_position_embeddings": SEQ}


class Judge:
    """Stands for the accuracy on problems: counts how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, engine, tokenizer, rank, world):
        self.calls += 1
        assert not engine.model.training
        return Found(self.calls / 10)


class Found:
    def __init__(self, accuracy):
        self.sums = torch.tensor([accuracy], dtype=torch.float64)
        self.samples = [{"prompt": "2 + 2 =", "completion": "4", "correct": 1.0}]

    def metrics(self):
        return {"eval/accuracy": float(self.sums[0])}


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    fit(toy_stage(Pretrain), run / "pretrain", 2)
    context = toy_stage(
        Context, data=ToySource(2 * SEQ), model=dict(rope_scaling=YARN, max_position_embeddings=2 * SEQ)
    )
    load_weights(context, resolve_checkpoint(run / "pretrain"))
    fit(context, run / "context_32k", 1)
    return run


def test_takes_over_rotary_settings_and_judges_twice(parents, tmp_path):
    stage = toy_stage(Sft, data=ToySource(2 * SEQ, documents=True), accuracy=Judge())
    load_weights(stage, resolve_checkpoint(parents / "context_32k"))
    assert stage.model.cfg.rope_scaling["factor"] == 4.0 and stage.cfg.max_position_embeddings == 2 * SEQ
    losses = fit(stage, tmp_path, 6)
    assert losses[-1] < losses[0]
    assert (stage.results["eval/accuracy_before"], stage.results["eval/accuracy"]) == (0.1, 0.2)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0, 6]


def test_an_own_rope_scaling_that_differs_is_refused(parents):
    model = dict(rope_scaling=YARN | {"factor": 2.0}, max_position_embeddings=2 * SEQ)
    with pytest.raises(ValueError, match=r"model\.rope_scaling=.*2\.0.* differs from .*4\.0"):
        load_weights(toy_stage(Sft, model=model), resolve_checkpoint(parents / "context_32k"))


def test_what_another_sample_says_changes_no_loss_and_questions_are_not_scored(parents, tmp_path):
    stage = toy_stage(Sft, data=ToySource(documents=True))
    load_weights(stage, resolve_checkpoint(parents / "pretrain"))
    row = stage.data[0]
    half = SEQ // 2
    other = {key: value.clone() for key, value in row.items()}
    other["tokens"][:half] = (other["tokens"][:half] + 7) % 60 + 1
    nats = []
    for r in (row, other):
        micro = stage.inputs({"rows": [r]})[0]
        assert micro.targets == float((row["labels"] != IGNORE).sum())
        state = stage.model(micro)
        logits = stage.model.head_logits(state["hidden"])[0]
        nats.append(torch.nn.functional.cross_entropy(logits[half:], row["labels"][half:], reduction="none"))
        assert bool((row["labels"][:3] == IGNORE).all())
        nats[-1] = torch.cat([nats[-1], state["mtp.0"][0, half:].flatten()])
    torch.testing.assert_close(nats[0], nats[1])
