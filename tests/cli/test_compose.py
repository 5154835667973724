"""Every configuration composes, precedence is what the design says, and runs get folders of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from litseek.cli.compose import WHAT, Composed, compose, conf_dir, jobs
from litseek.cli.errors import Usage
from litseek.cli.overrides import parse
from litseek.models.transformer import build
from litseek.precision import FP32

CONF = conf_dir()
STAGES = ["pretrain", "context_32k", "context_128k", "sft", "grpo"]
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
STRATEGIES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
PRESETS = sorted({path.parent.name for path in (CONF / "preset").glob("*/*.yaml")})
ARMS = sorted(
    str(p.relative_to(CONF.parent / "experiments").with_suffix("")) for p in CONF.parent.glob("experiments/*/*.yaml")
)
GROUPS = sorted(
    (folder.name, path.stem)
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name not in ("stage", "model", "preset")
    for path in folder.glob("*.yaml")
)


def one(*words: str, command: str = "train") -> Composed:
    (job,) = jobs(command, parse(words))
    return job


def missing(group: str, choice: str) -> list[str]:
    """Values for what a group's file leaves to the user."""
    found = flat(yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()), group)
    values = {"files": "[text]", "max_steps": "1"}
    return [f"{key}={values.get(key.rpartition('.')[2], 'text')}" for key, value in found.items() if value == "???"]


def flat(node: Any, path: str) -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {key: value for name, inner in node.items() for key, value in flat(inner, f"{path}.{name}").items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_every_stage_composes_with_every_model_and_strategy(stage: str, model: str) -> None:
    for strategy in STRATEGIES:
        cfg = one(f"stage={stage}", f"model={model}", f"strategy={strategy}", "init_from=somewhere").cfg
    assert cfg.stage.name == stage
    assert cfg.run_dir == f"runs/{model}"


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_every_file_of_every_group_composes(group: str, choice: str) -> None:
    command = next((command for command, whats in WHAT.items() if group == "what" and choice in whats), "train")
    one(f"{group}={choice}", *missing(group, choice), command=command)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_composes(arm: str) -> None:
    cfg = one(f"experiment={arm}", "init_from=somewhere", "seed=2").cfg
    assert cfg.experiment == arm
    assert cfg.run_dir == f"runs/{arm}/seed=2"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_preset_has_every_stage(preset: str, stage: str) -> None:
    cfg = one(f"stage={stage}", f"preset={preset}", "init_from=somewhere").cfg
    assert (cfg.preset, cfg.stage.name, cfg.run_dir) == (preset, stage, f"runs/{preset}")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_builds_on_the_meta_device(model: str) -> None:
    cfg = instantiate(OmegaConf.load(CONF / "model" / f"{model}.yaml"))
    with torch.device("meta"):
        built = build(cfg, FP32())
    assert sum(p.numel() for p in built.parameters()) == cfg.num_params()


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An arm in the current folder's experiments/, which changes what stage and preset set."""
    folder = tmp_path / "experiments" / "mine"
    folder.mkdir(parents=True)
    body = "# @package _global_\ndefaults:\n  - override /optim: adamw\nstage: {batch: 77}\noptim: {lr: 0.5}\n"
    (folder / "big_batch.yaml").write_text(body)
    (folder / "typo.yaml").write_text("# @package _global_\nstgae: {batch: 77}\n")
    (folder / "inner.yaml").write_text("# @package _global_\nstage: {bacth: 77}\n")
    monkeypatch.chdir(tmp_path)
    return "mine/big_batch"


def test_precedence(arm: str) -> None:
    plain, preset = one().cfg, one("preset=demo").cfg
    assert preset.stage.batch != plain.stage.batch or preset.optim != plain.optim
    ours = one("preset=demo", f"experiment={arm}").cfg
    assert (ours.stage.batch, ours.optim.lr, ours.optim._target_) == (77, 0.5, "litseek.optim.adamw.AdamWConfig")
    assert one("preset=demo", f"experiment={arm}", "stage.batch=3").cfg.stage.batch == 3
    assert one(f"experiment={arm}", "stage.batch=3", "preset=smoke").cfg.stage.batch == 3
    assert one("preset=demo", f"experiment={arm}", "optim=muon").cfg.optim._target_ == "litseek.optim.muon.MuonConfig"


def test_stage_comes_before_model() -> None:
    tiny = one("model=tiny").cfg.model.max_position_embeddings
    extended = one("stage=context_32k", "model=tiny", "init_from=x").cfg.model
    assert extended.max_position_embeddings > tiny and extended.rope_scaling.type == "yarn"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["model.hiden_size=3"],
            "model.hiden_size=3: there is no key 'model.hiden_size'; did you mean model.hidden_size?",
        ),
        (["lr=3"], "lr=3: there is no key 'lr'; did you mean optim.lr?"),
        (["+lrr=3"], "+lrr=3: there is no key 'lrr'"),
        (["model=tinny"], "model=tinny is not in conf/model; did you mean tiny?"),
        (["preset=dmeo"], "preset=dmeo is not in conf/preset; did you mean demo?"),
        (
            ["experiment=mine/big_bach"],
            "experiment=mine/big_bach has no file experiments/mine/big_bach.yaml; did you mean",
        ),
        (["experiment=mine/typo"], "experiment=mine/typo: there is no key 'stgae'; did you mean stage?"),
        (["experiment=mine/inner"], "stage.bacth=77: Pretrain has no setting 'bacth'; did you mean batch?"),
        (["+model.hiden_size=3"], "has no setting 'hiden_size'; did you mean hidden_size?"),
        (["stage=sft"], "stage=sft needs init_from: give init_from=…."),
        (["data=jsonl"], "stage=pretrain needs data.files: give data.files=…."),
        (["seed=1,2"], "seed=1,2 names several values: add -m to run each, or write a list as seed=[1,2]."),
        (["optim.betas=[1"], "optim.betas=[1 is not understood"),
        (["seed"], "'seed' is neither key=value nor a flag"),
        (["--mulitrun"], "'--mulitrun' is not a flag; did you mean --multirun?"),
        (["optim.lr=abc"], "optim.lr='abc' is not a number."),
        (["trainer.max_steps=abc"], "trainer.max_steps='abc' is not an integer."),
        (["stage.checkpoint_every=1.5"], "stage.checkpoint_every=1.5 is not an integer."),
        (["stage.compile=maybe"], "stage.compile='maybe' is not true or false."),
        (["data.seq_len=null"], "data.seq_len=null is not an integer."),
        (["strategy.recompute=attend"], "strategy.recompute='attend' is not"),
        (["trainer._target_=nowhere.Trainer"], "trainer._target_=nowhere.Trainer cannot be imported"),
    ],
)
def test_mistakes_get_one_sentence(words: list[str], sentence: str, arm: str) -> None:
    with pytest.raises(Usage) as caught:
        one(*words)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_that_no_file_mentions_need_no_plus() -> None:
    cfg = one("model.seq_aux=false", "model.rope_scaling.factor=4", "~callbacks.progress").cfg
    assert cfg.model.seq_aux is False and cfg.model.rope_scaling.factor == 4
    assert "progress" not in cfg.callbacks
    assert one("stage=grpo", "init_from=x", "stage.rewards={answered:1}").cfg.stage.rewards.answered == 1


def test_sweeps_multiply_and_have_folders_of_their_own(arm: str) -> None:
    assert [str(job.cfg.run_dir) for job in jobs("train", parse(["-m", f"experiment={arm}", "seed=0,1"]))] == [
        "runs/mine/big_batch/seed=0",
        "runs/mine/big_batch/seed=1",
    ]
    asked = parse(["-m", f"experiment={arm},mine/big_batch", "optim.betas=[0.9,0.95]"])
    with pytest.raises(Usage, match="share the run folder"):
        jobs("train", asked)
    found = [str(job.cfg.run_dir) for job in jobs("train", parse(["-m", "optim.lr=0.1,0.2", "run_dir=here"]))]
    assert found == ["here/optim.lr=0.1", "here/optim.lr=0.2"]
    found = [str(job.cfg.run_dir) for job in jobs("train", parse(["-m", "model=tiny,small", "seed=3"]))]
    assert found == ["runs/tiny", "runs/small"]


def test_pipeline_hands_settings_to_its_stages() -> None:
    words = [
        "preset=smoke",
        "sft.trainer.max_steps=5",
        "seed=4",
        "grpo.optim=muon",
        "model.hidden_size=48",
        "run_dir=r=1",
    ]
    cfg = one(*words, command="pipeline").cfg
    assert list(cfg.jobs) == STAGES
    assert [job.seed for job in cfg.jobs.values()] == [4] * 5
    assert [job.model.hidden_size for job in cfg.jobs.values()] == [48] * 5
    assert cfg.jobs.sft.trainer.max_steps == 5 != cfg.jobs.grpo.trainer.max_steps
    assert cfg.jobs.grpo.optim._target_ != cfg.jobs.sft.optim._target_
    assert [job.init_from for job in cfg.jobs.values()] == [None, *(f"r=1/{stage}" for stage in STAGES[:-1])]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["start=stf"], "'stf' is not a stage; did you mean sft?"),
        (["stages=[pretrain]", "start=sft"], "start=sft is not among stages=['pretrain']"),
        (["stages=[sft]"], "stage=sft needs init_from"),
        (["stf.seed=3"], "there is no key 'stf.seed'"),
        (["sft.trainer.max_stesp=3"], "there is no key 'trainer.max_stesp'; did you mean trainer.max_steps?"),
    ],
)
def test_pipeline_mistakes(words: list[str], sentence: str) -> None:
    with pytest.raises(Usage) as caught:
        one(*words, command="pipeline")
    assert sentence in str(caught.value)


def test_composition_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose("train", ())
    assert list(tmp_path.iterdir()) == []
