"""From a command line to checked configurations: defaults < model < stage < preset < experiment arm < command line."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import litseek
from litseek.cli.check import allow, check_missing, check_root, check_targets, explain, is_value
from litseek.cli.errors import Usage
from litseek.cli.overrides import Request, expand, key_of, swept_keys

STAGED = ("train", "pipeline")
"""Commands that have stages, presets, experiment arms and a run folder named after them."""

WHAT = {"bench": ("kernels", "profile", "slice", "step"), "plan": ("schedule",)}
"""The files of conf/what that each command takes."""

PARENT = "parent:"
"""Stands for the run folder in a pipeline stage's `init_from` until the run has its name."""


@dataclass(frozen=True)
class Composed:
    """One job: its configuration, what it came from, and the group choices that Hydra made."""

    cfg: DictConfig
    overrides: tuple[str, ...]
    choices: dict[str, Any] = field(default_factory=dict)
    title: str = ""

    def yaml(self) -> str:
        return OmegaConf.to_yaml(self.cfg, resolve=True)


def conf_dir() -> Path:
    """`conf/` beside the package in an installed wheel, else at the top of the repository."""
    package = Path(litseek.__file__).resolve().parent
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise Usage(
        f"no conf/train.yaml beside {package} nor at the top of its repository: the installation is incomplete."
    )


def experiments_roots() -> list[Path]:
    """Folders that hold `experiments/`: the current one first, then the repository's."""
    roots = [Path.cwd(), conf_dir().parent]
    return [root for i, root in enumerate(roots) if (root / "experiments").is_dir() and root not in roots[:i]]


def jobs(command: str, request: Request) -> list[Composed]:
    """Every job of a request, all composed and checked before the first one starts."""
    swept = swept_keys(request)
    composed = []
    for overrides in expand(request):
        job = compose(command, overrides, sweep=swept if request.multirun else None)
        composed.append(job)
    folders = [str(job.cfg.run_dir) for job in composed if command in STAGED]
    if twice := [folder for i, folder in enumerate(folders) if folder in folders[:i]]:
        raise Usage(f"two jobs of this sweep share the run folder {twice[0]}: a value is named twice.")
    return composed


def compose(command: str, overrides: tuple[str, ...], sweep: list[str] | None = None) -> Composed:
    """One checked configuration. `sweep` names the keys that vary between the jobs of a sweep (None: no sweep)."""
    if not (conf_dir() / f"{command}.yaml").is_file():
        raise Usage(f"{conf_dir() / (command + '.yaml')} is missing: the installation is incomplete.")
    what, known = _take(overrides, "what"), WHAT.get(command, ())
    if command in WHAT and what not in (None, *known) and (conf_dir() / "what" / f"{what}.yaml").is_file():
        raise Usage(f"what={what} does not go with litseek {command}; it takes {', '.join(known)}.")
    stages: dict[str, DictConfig] = {}
    if command == "train":
        cfg, choices = _train(overrides)
        stages[str(choices["stage"])] = cfg
    elif command == "pipeline":
        cfg, choices, stages = _pipeline(overrides)
    else:
        with _hydra():
            cfg, choices = _compose(command, list(overrides))
    if command in STAGED:
        _name_run(cfg, stages, _run_dir(cfg, overrides, choices, sweep))
    for stage, job in stages.items():
        _check(job, f"stage={stage}")
    if command != "train":
        _check(cfg, f"litseek {command}")
    if command == "pipeline":
        with open_dict(cfg):  # resolved, since their interpolations start at their own root
            cfg.jobs = {stage: OmegaConf.to_container(job, resolve=True) for stage, job in stages.items()}
    return Composed(cfg, overrides, choices, title=" ".join(o for o in overrides if key_of(o) in (sweep or ())))


def make(node: DictConfig, **extra: Any) -> Any:
    """The node's object. `extra` goes past Hydra, which would take a dataclass apart."""
    return instantiate(node, _convert_="all", _partial_=True)(**extra)


def cluster_of(cfg: DictConfig) -> DictConfig | None:
    """Where a job is to be submitted; None when it runs here. A pipeline is one job, its first stage's."""
    found = next(iter(cfg.jobs.values()), cfg) if "jobs" in cfg else cfg
    cluster = found.get("cluster")
    return cluster if cluster and "_target_" in cluster else None


def _check(cfg: DictConfig, about: str) -> None:
    check_missing(cfg, about)
    check_targets(cfg)
    OmegaConf.set_struct(cfg, True)


def _train(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, Any]]:
    """conf/train.yaml with the preset and the experiment arm put where they take precedence."""
    preset, arm = _take(overrides, "preset"), _take(overrides, "experiment")
    plain = [o for o in overrides if key_of(o) not in ("preset", "experiment")]
    with _hydra():
        known = _root_keys("train")
        if arm:
            plain.append(_arm_override(arm))
        if preset:
            plain.append(_preset_override(preset, plain))
        cfg, choices = _compose("train", plain)
    check_root(cfg, known, [o for o in overrides if key_of(o) in ("experiment", "preset") or o.startswith("+")])
    with open_dict(cfg):
        cfg.preset, cfg.experiment = preset, arm
    return cfg, choices


def _pipeline(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, Any], dict[str, DictConfig]]:
    """conf/pipeline.yaml, and every stage's configuration in order.

    A setting of pipeline.yaml stays here, `<stage>.key=value` goes to that stage and anything else to all of them.
    """
    with _hydra():
        own = _root_keys("pipeline")
        mine = [o for o in overrides if key_of(o) in own - {"preset", "experiment"}]
        cfg, _ = _compose("pipeline", mine)
    allowed = [p.stem for p in sorted((conf_dir() / "stage").glob("*.yaml"))]
    for stage in [*cfg.stages, *([cfg.start] if cfg.start else [])]:
        if stage not in allowed:
            raise Usage.nearest(f"'{stage}' is not a stage", str(stage), allowed)
    if cfg.start and cfg.start not in cfg.stages:
        raise Usage(f"start={cfg.start} is not among stages={list(cfg.stages)}.")
    shared = [o for o in overrides if key_of(o) not in own or key_of(o) in ("seed", "preset", "experiment", "debug")]
    scoped = {s: [o for o in shared if key_of(o).startswith(f"{s}.")] for s in allowed}
    common = [o for o in shared if not any(o in of_stage for of_stage in scoped.values())]
    jobs: dict[str, DictConfig] = {}
    choices: dict[str, Any] = {}
    parent = cfg.init_from
    for stage in cfg.stages:
        only = [o.replace(f"{stage}.", "", 1) for o in scoped[stage]]
        start = [f"init_from={_quote(str(parent))}"] if parent else []
        jobs[stage], chosen = _train((f"stage={stage}", *start, *common, *only))
        choices = choices or chosen
        parent = f"{PARENT}{stage}"
    with open_dict(cfg):
        cfg.preset, cfg.experiment = _take(overrides, "preset"), _take(overrides, "experiment")
    return cfg, choices, jobs


def _name_run(cfg: DictConfig, stages: dict[str, DictConfig], run_dir: str) -> None:
    """Fill in `run_dir`; a pipeline's stages start from the ones before them in the same folder."""
    cfg.run_dir = run_dir
    for job in stages.values():
        job.run_dir = run_dir
        parent = OmegaConf.to_container(job)["init_from"]  # type: ignore[index, call-overload]  # may be ???
        if isinstance(parent, str) and parent.startswith(PARENT):
            job.init_from = str(Path(run_dir) / parent.removeprefix(PARENT))


@contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="litseek"):
        yield


def _compose(command: str, overrides: list[str]) -> tuple[DictConfig, dict[str, Any]]:
    """Hydra's composition. A key that its object takes but no file mentions (`model.seq_aux`) needs no `+`."""
    search = ["hydra.searchpath=[" + ",".join(_quote(f"file://{root}") for root in experiments_roots()) + "]"]
    try:
        try:
            cfg = hydra_compose(command, [*overrides, *search], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException):
            values = [o for o in overrides if is_value(o, conf_dir())]
            base = hydra_compose(command, [*(o for o in overrides if o not in values), *search])
            allowed = [allow(o, base) if o in values else o for o in overrides]
            cfg = hydra_compose(command, [*allowed, *search], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides, lambda some: _compose(command, some)[0], conf_dir()) from error
    choices = {k: v for k, v in cfg.hydra.runtime.choices.items() if not k.startswith("hydra/")}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


@functools.cache
def _root_keys(command: str) -> frozenset[str]:
    return frozenset(map(str, _compose(command, [])[0]))


def _quote(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _take(overrides: tuple[str, ...], key: str) -> str | None:
    values = [o.partition("=")[2] for o in overrides if key_of(o) == key]
    return None if not values or values[-1] in ("", "null") else values[-1]


def arms() -> list[str]:
    """`<folder>/<arm>` of every file in reach of `experiment=`."""
    return [
        str(path.relative_to(root / "experiments").with_suffix(""))
        for root in experiments_roots()
        for path in sorted((root / "experiments").glob("*/*.yaml"))
    ]


def _arm_override(arm: str) -> str:
    """`experiment=a/b` becomes a group choice that comes last, so that it wins over stage and preset."""
    if arm not in arms():
        raise Usage.nearest(f"experiment={arm} has no file experiments/{arm}.yaml", arm, arms())
    return f"+experiments@_global_={arm}"


def _preset_override(preset: str, others: list[str]) -> str:
    """A preset is one file, or a folder with one file a stage: conf/preset/demo/sft.yaml."""
    folder = conf_dir() / "preset"
    if (folder / f"{preset}.yaml").is_file():
        return f"preset={preset}"
    if not (folder / preset).is_dir():
        raise Usage.nearest(f"preset={preset} is not in conf/preset", preset, {p.stem for p in folder.iterdir()})
    stage = _compose("train", others)[1]["stage"]
    if not (folder / preset / f"{stage}.yaml").is_file():
        have = sorted(p.stem for p in (folder / preset).glob("*.yaml") if p.stem != "all")
        raise Usage(f"preset={preset} says nothing about stage={stage}; it has {', '.join(have)}.")
    return f"preset={preset}/{stage}"


def _run_dir(cfg: DictConfig, overrides: tuple[str, ...], choices: dict[str, Any], sweep: list[str] | None) -> str:
    """`runs/<preset or model>`; an arm goes to `runs/<folder>/<arm>/seed=<n>`; a sweep adds what varies.

    `run_dir=` on the command line is taken as it is, and under -m it replaces `runs`.
    """
    given = any(key_of(o) == "run_dir" for o in overrides)
    if given and sweep is None:
        return str(cfg.run_dir)
    base, named = (Path(cfg.run_dir) if given else Path("runs")), {"experiment", "seed"}
    if not cfg.experiment and not given:
        base = base / str(cfg.preset or choices.get("model", "default"))
        named.add("preset" if cfg.preset else "model")
    parts = [cfg.experiment] if cfg.experiment else []
    varied = [o for o in overrides if key_of(o) in (sweep or []) and key_of(o) not in named]
    if varied:
        parts.append(",".join(o.lstrip("+").replace("/", ":") for o in varied))
    if cfg.experiment or "seed" in (sweep or []):
        parts.append(f"seed={cfg.seed}")
    return str(base.joinpath(*parts))
