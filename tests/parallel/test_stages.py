"""The later stages train on layouts as on one process, GRPO's rollouts included."""

import pytest
import torch

from litseek.data import tokenizer as bpe
from litseek.data.arithmetic import Arithmetic
from litseek.data.batch import MicroBatch
from litseek.parallel.schedule import KINDS, fewest_micros, make_schedule
from litseek.parallel.strategy import LitseekStrategy
from litseek.rl.evaluate import Accuracy
from litseek.stages.context import Context
from litseek.stages.sft import Sft
from tests.parallel.layouts import LAYOUTS, WORLDS, run_here, train, train_here
from tests.parallel.test_layouts import same
from tests.ranks import ranks
from tests.stages import test_grpo as grpo
from tests.toy import SEQ, ToySource

YARN = {"factor": 2.0, "original_max_position_embeddings": SEQ}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "pretrain"
    train_here(folder, {}, steps=2)
    return folder


def longer(**keys):
    return dict(data=ToySource(2 * SEQ, documents=True, held_out=5), **keys)


def context():
    return longer(cls=Context, model=dict(rope_scaling=YARN, max_position_embeddings=2 * SEQ))


@pytest.fixture(scope="module")
def extended(parent, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "context_32k"
    return folder, train_here(folder, {}, steps=3, parent=parent, biased=False, **context())


@pytest.mark.parametrize("name", ["ep2", "pp2_v", "ep2_pp2_v"])
def test_context_extension_scores_and_trains_alike(name, parent, extended, tmp_path):
    """Also "before", with the parent's frequencies, and "untrained": both are in the results."""
    _, one = extended
    assert {"val/loss_before", "val/loss_untrained", "val/loss"} <= one["results"].keys()
    same(train(name, tmp_path, steps=3, parent=parent, biased=False, **context()), one)


@pytest.mark.parametrize("name", ["ep2", "pp2_v"])
def test_sft_trains_alike(name, extended, tmp_path):
    folder, _ = extended
    one = train_here(tmp_path / "one", {}, steps=3, parent=folder, biased=False, **longer(cls=Sft))
    same(train(name, tmp_path / "two", steps=3, parent=folder, biased=False, **longer(cls=Sft)), one)


# -- GRPO -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.train(["1 + 2 - 3 = 0\nAnswer: 4"], vocab_size=264, digits=1).save(folder)
    return str(folder)


WITH_REFERENCE = dict(group=4, beta=0.1, updates_per_rollout=2)
WITHOUT = dict(group=2, beta=0.0, problems=1)
"""Half of the groups teach nothing: ranks are left with different numbers of micro-batches. And with one problem to be
judged by all but one has nothing to generate."""


def reinforce_here(folder, layout, tokenizer, problems=5, steps=3, resume=None, **keys):
    accuracy = Accuracy(Arithmetic("eval", options=grpo.OPTIONS), count=problems, max_tokens=6)
    settings = dict(batch=16, micro_batch=2, peak=1e-4, accuracy=accuracy)
    stage = grpo.make(tokenizer, model=MODEL, **{**settings, **keys})
    filled, blanks = LitseekStrategy.filled, []

    def counted(self, micros, most):
        found = filled(self, micros, most)
        blanks.append(len(found) - len(micros))
        return found

    LitseekStrategy.filled = counted
    try:
        found = run_here(stage, folder, layout, steps, resume)
    finally:
        LitseekStrategy.filled = filled
    return found | {"rollout": stage.rollout.state_dict(), "blanks": sum(blanks), "gap": stage.sampling_gap}


MODEL = grpo.MODEL.replace(num_hidden_layers=4, initializer_range=0.1)


@pytest.fixture(scope="module")
def alone(tokenizer, tmp_path_factory):
    return {
        beta: reinforce_here(tmp_path_factory.mktemp("one"), {}, tokenizer, **keys)
        for beta, keys in ((0.1, WITH_REFERENCE), (0.0, WITHOUT))
    }


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("ep2", WITH_REFERENCE),
        ("pp2_v", WITH_REFERENCE),
        ("ep2", WITHOUT),
        ("ep2_edp2", WITHOUT),
        ("ep2_pp2_v", WITHOUT),
    ],
)
def test_grpo_samples_scores_and_trains_alike(name, keys, alone, tokenizer, tmp_path):
    one = alone[keys["beta"]]
    parts = ranks(WORLDS.get(name, 2)).run(reinforce_here, tmp_path, LAYOUTS[name], tokenizer, **keys)
    for part in parts:
        for key, value in one["rollout"].items():
            if key == "old_logprobs":  # a rank whose samples all teach nothing scores one of them nevertheless
                scored = value.any(dim=1)
                assert scored.all() or not keys["beta"]
                torch.testing.assert_close(part["rollout"][key][scored], value[scored], rtol=0, atol=1e-5)
            elif value.is_floating_point():
                torch.testing.assert_close(part["rollout"][key], value, rtol=0, atol=1e-5)
            else:
                assert torch.equal(part["rollout"][key], value), key
        assert part["gap"] < 1e-5
    assert any(part["blanks"] for part in parts) == (not keys["beta"])
    same(parts, one, atol=1e-6)  # a loss whose advantages cancel is near 0


def test_grpo_goes_on_in_the_middle_of_a_rollout_on_another_layout(alone, tokenizer, tmp_path):
    ranks(2).run(reinforce_here, tmp_path / "ep2", LAYOUTS["ep2"], tokenizer, steps=1, **WITH_REFERENCE)
    saved = str(tmp_path / "ep2" / "checkpoints" / "step-00000001")
    run = ranks(2).run(reinforce_here, tmp_path, LAYOUTS["pp2_v"], tokenizer, resume=saved, **WITH_REFERENCE)
    one = alone[0.1]
    same(run, one | {key: one[key][1:] for key in ("losses", "norms")}, atol=1e-6)


# -- micro-batches that fill up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_fewest_micro_batches_are_what_the_schedule_takes(kind):
    for ranks_, micros in ((2, 1), (2, 3), (2, 5), (4, 1), (4, 9)):
        found = fewest_micros(kind, ranks_, micros)
        make_schedule(kind, ranks_, found)
        for fewer in range(micros, found):
            with pytest.raises(ValueError, match="micro-batches"):
                make_schedule(kind, ranks_, fewer)


def test_ranks_that_share_experts_run_as_many():
    micro = MicroBatch.of(torch.arange(6).view(2, 3))
    assert len(LitseekStrategy().filled([micro], 3)) == 1
    real, *blank = LitseekStrategy(ep=2).filled([micro], 3)
    assert real is micro and all(m.blank and m.targets == 0 and m.tokens.shape == (1, 3) for m in blank)
    assert len(blank) == 2
    assert len(LitseekStrategy(pp=2, schedule="dualpipev").filled([micro], 1)) == 4
