"""What `litseek --help` and `litseek <command> --help` print."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import OmegaConf

from litseek.cli.compose import STAGED, WHAT, arms, conf_dir
from litseek.cli.errors import Usage

EXAMPLES = """\
Examples
  litseek pipeline preset=demo                                all five stages on a CPU, into runs/demo
  litseek pipeline preset=demo start=sft sft.trainer.max_steps=200
  litseek train stage=pretrain model=tiny trainer.max_steps=100 run_dir=runs/mine
  litseek train stage=sft model=tiny init_from=runs/mine run_dir=runs/mine
  litseek train -m experiment=balance/aux_free,balance/none seed=0,1,2
  litseek generate checkpoint=runs/demo prompt="3 + 4 ="
  litseek report runs/demo
  litseek bench what=step model=yardstick precisions=[bf16] batch=[8]
  litseek plan what=schedule kind=dualpipev ranks=8 microbatches=20 out=timeline.json
"""

RULES = """\
Settings are group=choice or key=value; lists are written batch=[4,8]; texts and paths are taken as typed.
Precedence: command line > experiment arm > preset > stage > model > defaults.
Flags: -m runs every combination of values with commas; --cfg prints the configuration and stops; debug=true shows tracebacks.
"""

NOTES = {
    "pipeline": """\
Keys of its own: start=<stage> reruns from that stage; stages=[pretrain,sft] chooses which; prompt=… is answered at the end.
Any other setting goes to every stage; a stage's name before it keeps it to that stage: sft.trainer.max_steps=50 grpo.seed=3
""",
    "train": """\
Runs into <run_dir>/<stage>. The same command again goes on from the last checkpoint, or says that the stage is finished.
Default run_dir: runs/<preset or model>; an experiment arm goes to runs/<folder>/<arm>/seed=<n>.
""",
    "bench": """\
what=step: the training step on random tokens, and the peers of vs=[torchtitan,transformers] after it. what=slice: MoE blocks of
the 671B's widths. what=profile: where the step's time goes, against each part's floor. what=kernels: kernels/bench.
""",
    "plan": """\
what=schedule: bubble and peak activations of a pipeline schedule, beside the report's formulas, in units of f, b and w. `out`
gets the list of events, and a picture of them lies beside it.
""",
}


def overview(commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    rows = "\n".join(f"  {name:<{width}}  {line}" for name, line in commands.items())
    return (
        f"litseek: DeepSeek-V3 from pre-training to GRPO.\n\nUsage: litseek <command> group=choice key=value …\n\n"
        f"Commands\n{rows}\n\n{RULES}\n{EXAMPLES}\nlitseek <command> --help lists a command's groups and keys."
    )


def command(name: str, line: str) -> str:
    """Groups with their choices, and keys with their defaults, read from conf/."""
    root = conf_dir() / f"{name}.yaml"
    if not root.is_file():
        raise Usage(f"{root} is missing: the installation is incomplete.")
    defaults = OmegaConf.to_container(OmegaConf.load(root)).get("defaults", [])  # type: ignore[union-attr]
    named = [group for entry in defaults if isinstance(entry, dict) for group in entry]
    own = {"what": " ".join(WHAT.get(name, ()))}
    groups = [f"  {group:<11}{own.get(group) or choices(group)}" for group in named]
    if groups and name in STAGED:
        groups.append(f"  {'experiment':<11}{' '.join(arms())}")
    keys = settings(root)
    if name == "plan":  # all of its settings belong to what is planned
        keys += [key for what in WHAT[name] for key in settings(conf_dir() / "what" / f"{what}.yaml")]
    parts = [
        f"litseek {name}: {line}",
        "\n".join(["Groups", *groups]) if groups else "",
        "\n".join(["Keys, as key=value", *keys]),
        NOTES.get(name, "").rstrip(),
        RULES.rstrip(),
    ]
    return "\n\n".join(part for part in parts if part)


def settings(file: Path) -> list[str]:
    """Lines of a YAML file that set a root key, with their comments."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return [f"  {text}" for text in lines if re.match(r"\w+:.*\S", text) and text != "defaults:"]


def choices(group: str) -> str:
    folder = conf_dir() / group
    names = sorted({p.stem for p in folder.iterdir() if p.suffix == ".yaml" or p.is_dir()}) if folder.is_dir() else []
    return " ".join(names)
