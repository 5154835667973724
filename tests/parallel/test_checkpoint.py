"""Finding weights by run, stage, checkpoint or released folder, and putting them into a model."""

import json

import pytest
import torch

from litseek.errors import LitseekError
from litseek.models.hf import save_pretrained
from litseek.models.transformer import Transformer
from litseek.parallel import storage
from litseek.parallel.checkpoint import load_model, load_weights, resolve_checkpoint
from tests.toy import toy_config, with_biases


def model(seed=1, **changes) -> Transformer:
    return with_biases(Transformer(toy_config(**changes), seed=seed))


@pytest.fixture
def run(tmp_path):
    """A run of two finished stages and one that has begun."""
    for seed, stage in enumerate(("pretrain", "context_32k", "sft")):
        for step in (1, 2):
            ours = model(seed)
            state = {"state_dict": ours.state_dict(), "stage": {"seq_len": 16}}
            folder = tmp_path / "demo" / stage / "checkpoints" / f"step-{step:08d}"
            storage.save(folder, state, ours.cfg.to_dict(), "{}")
        if stage != "sft":
            (tmp_path / "demo" / stage / "receipt.json").write_text("{}")
    return tmp_path / "demo"


def same(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())


def test_a_run_means_its_last_finished_stage(run):
    ref = resolve_checkpoint(run)
    assert (ref.stage, ref.path.name, ref.released, ref.seq_len) == ("context_32k", "step-00000002", False, 16)
    assert same(load_model(ref), model(1))
    assert ref.tokenizer == ref.path / "tokenizer.json"


def test_a_stage_and_a_checkpoint(run):
    assert same(load_model(resolve_checkpoint(run / "sft")), model(2))
    ref = resolve_checkpoint(run / "pretrain" / "checkpoints" / "step-00000001")
    assert ref.path.name == "step-00000001"
    assert ref.digest == resolve_checkpoint(ref.path).digest != resolve_checkpoint(run / "sft").digest


def test_a_released_folder(tmp_path):
    theirs = model(num_nextn_predict_layers=0)
    save_pretrained(theirs, tmp_path / "released")
    ref = resolve_checkpoint(tmp_path / "released")
    assert ref.released and ref.tokenizer is None and len(ref.digest) == 64
    ours = model(9, num_nextn_predict_layers=0)
    load_weights(ours, ref)
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(ours.logits(tokens), theirs.logits(tokens))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: None, "no such checkpoint, stage or run folder"),
        (lambda p: p.mkdir(), "neither a run, a stage, a checkpoint"),
        (lambda p: (p / "checkpoints").mkdir(parents=True), "no finished checkpoint in it yet"),
        (lambda p: (p / "pretrain").mkdir(parents=True), "no stage of this run has finished; give .*pretrain"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(tmp_path, prepare, message):
    prepare(tmp_path / "x")
    with pytest.raises(LitseekError, match=message):
        resolve_checkpoint(tmp_path / "x")


def test_another_models_shape_is_refused_by_key(run):
    with pytest.raises(LitseekError, match=r"model\.hidden_size=48 does not fit .* has 32"):
        load_weights(model(hidden_size=48), resolve_checkpoint(run))
    with pytest.raises(LitseekError, match=r"model\.num_nextn_predict_layers=2, but .* only 1"):
        load_weights(model(num_nextn_predict_layers=2), resolve_checkpoint(run))


def test_a_parameter_that_is_missing_or_misshapen_is_named(run):
    folder = resolve_checkpoint(run).path
    state = storage.load(folder)
    weights = state["state_dict"]
    for changed, message in (
        ({k: v for k, v in weights.items() if k != "norm.weight"}, "has no 'norm.weight'"),
        (weights | {"norm.weight": torch.ones(5)}, r"'norm.weight' has shape \(5,\), the model wants \(32,\)"),
        (weights | {"odd": torch.ones(5)}, "has 'odd', which the model has no place for"),
    ):
        storage.save(folder, state | {"state_dict": changed}, toy_config().to_dict())
        with pytest.raises(LitseekError, match=message):
            load_weights(model(), resolve_checkpoint(folder))


def test_rotary_settings_and_left_out_mtp_depths_may_differ(run):
    ref = resolve_checkpoint(run)
    scaling = {"factor": 4.0, "original_max_position_embeddings": 16}
    ours = model(9, num_nextn_predict_layers=0, rope_scaling=scaling, max_position_embeddings=64)
    load_weights(ours, ref)
    assert torch.equal(ours.lm_head.weight, model(1).lm_head.weight)


def test_a_damaged_config_is_named(run):
    path = resolve_checkpoint(run).path / "config.json"
    path.write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(LitseekError, match=r"config\.json: not a model configuration"):
        resolve_checkpoint(run)
