"""Context extension: what it measures before and after, and what it refuses."""

import json

import pytest

from litseek.parallel.checkpoint import load_weights, resolve_checkpoint
from litseek.stages.context import Context
from litseek.stages.pretrain import Pretrain
from tests.stages.fitting import fit
from tests.toy import SEQ, ToySource, toy_stage

YARN = {"factor": 4.0, "original_max_position_embeddings": SEQ}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "pretrain"
    fit(toy_stage(Pretrain), folder, 3)
    return folder


def context(seq_len=4 * SEQ, scaling=YARN, reach=4 * SEQ, **keys):
    data = ToySource(seq_len=seq_len)
    return toy_stage(Context, data=data, model=dict(rope_scaling=scaling, max_position_embeddings=reach), **keys)


def test_scores_old_frequencies_yarn_untrained_and_trained(parent, tmp_path):
    stage = context(name="context_32k", checkpoint_every=2)
    load_weights(stage, resolve_checkpoint(parent))
    fit(stage, tmp_path, 3)
    results = stage.results
    assert {"val/bits_per_byte", "val/bits_per_byte_before", "val/bits_per_byte_untrained"} <= results.keys()
    assert results["val/bits_per_byte_before"] != results["val/bits_per_byte_untrained"]
    written = json.loads((tmp_path / "loss_by_position.json").read_text())
    assert list(written["arms"]) == ["old frequencies", "yarn untrained", "yarn trained"]
    assert written["old_length"] == SEQ and len(written["positions"]) == len(written["arms"]["yarn trained"]) == 64
    assert str(stage.data.inherited).endswith("tokenizer.json")

    again = context(name="context_32k")
    load_weights(again, resolve_checkpoint(parent))
    fit(again, tmp_path / "again", 3, resume=tmp_path / "checkpoints/step-00000002")
    assert again.results == results
    assert again.by_position == stage.by_position


def test_old_frequencies_are_the_parents_model(parent, tmp_path):
    stage = context(seq_len=SEQ)
    load_weights(stage, resolve_checkpoint(parent))
    fit(stage, tmp_path, 1)
    before = json.loads((parent / "checkpoints" / "step-00000003" / "state.json").read_text())["stage"]["results"]
    assert stage.results["val/loss_before"] == pytest.approx(before["val/loss"], rel=1e-6)


def test_a_stage_without_a_parent_is_refused(tmp_path):
    with pytest.raises(ValueError, match="init_from is missing"):
        fit(context(), tmp_path, 1)


def test_too_long_rows_are_refused_naming_both_keys(parent):
    with pytest.raises(ValueError, match=r"data\.seq_len=64 exceeds model\.max_position_embeddings=32"):
        context(reach=32)
    with pytest.raises(ValueError, match=r"data\.seq_len=64 exceeds what model\.rope_scaling reaches: factor=2"):
        context(scaling=YARN | {"factor": 2.0})
    with pytest.raises(ValueError, match="needs YaRN"):
        load_weights(context(scaling=None), resolve_checkpoint(parent))
    with pytest.raises(ValueError, match=r"original_max_position_embeddings=8 is not the length 16"):
        load_weights(
            context(scaling=YARN | {"factor": 8.0, "original_max_position_embeddings": 8}), resolve_checkpoint(parent)
        )
