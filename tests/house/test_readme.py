"""The README keeps its word: its commands run, its paths exist, its settings have the defaults it states."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from litseek.cli.__main__ import COMMANDS, main
from litseek.cli.compose import compose, jobs
from litseek.cli.overrides import parse

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
BLOCK = re.compile(r"^```sh(?P<kind>[^\n]*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(kind of the block, words) of each command; comments are dropped, lines that end in a backslash joined."""
    found = []
    for block in BLOCK.finditer(text):
        for line in block["body"].replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.append((block["kind"].strip(), words))
    return found


ALL = [(kind, words) for name in DOCUMENTS for kind, words in commands((ROOT / name).read_text(encoding="utf-8"))]
LITSEEK = [(kind, words[1:]) for kind, words in ALL if words[0] == "litseek"]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Cells of a section's table, without its header."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def test_every_command_is_known():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert LITSEEK and {"demo", "test"} <= {words[1] for _, words in ALL if words[0] == "make"}
    for _, words in ALL:
        assert words[0] in ("make", "litseek"), words
        known = targets if words[0] == "make" else set(COMMANDS)
        assert words[1] in known, words


@pytest.mark.parametrize("words", [words for _, words in LITSEEK], ids=" ".join)
def test_command_composes(words: list[str]):
    assert jobs(words[0], parse(words[1:], positional=COMMANDS[words[0]].positional))


def at_smoke_size(words: list[str]) -> list[str]:
    """The same command with preset=smoke, two steps a stage, one seed, and nothing sent or drawn."""
    words = [re.sub(r"^(seed=\d+),.*", r"\1", word) for word in words]
    if words[0] not in ("train", "pipeline"):
        return words
    if any(w.startswith("experiment=") for w in words):  # an arm's sizes win over a preset's: shrink these themselves
        small = [
            "data.corpus.packages=[json]",
            "data.validation_fraction=0.2",
            "data.validation_bytes=2000",
            "stage.batch=4",
        ]
        return [*words, *small, "stage.micro_batch=4", "trainer.max_steps=2", "logger=none"]
    kept = [w for w in words if not re.match(r"(preset|model|trainer\.max_steps)=", w)]
    if any(w.startswith("trainer.devices=") for w in words):  # tests/parallel has the other stages on ranks
        kept.append("stages=[pretrain,grpo]")
    return [*kept, "preset=smoke", "trainer.max_steps=2", "logger=none"]


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    for kind, words in LITSEEK:
        if kind == "gpu":
            continue
        small = at_smoke_size(words)
        if any(w.startswith("trainer.devices=") for w in small):  # which starts the program of this process again
            ran = subprocess.run([sys.executable, "-m", "litseek", *small], capture_output=True, text=True, timeout=300)
            status, said = ran.returncode, ran.stderr
        else:
            status, said = main(small), capsys.readouterr().err
        assert status == 0, f"litseek {' '.join(small)}\n{said}"
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()


def test_links_lead_somewhere():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)]+)\)", text):
            assert link.startswith("https://") or (ROOT / link.split("#")[0]).exists(), f"{name} links to {link}"


def test_file_tour_is_true():
    tour = rows("File tour")
    for folder, _, what in tour:
        path = ROOT / folder.strip("`")
        assert path.exists(), f"the tour has {folder}, which does not exist"
        for name in re.findall(r"`([\w./*]+)`", what):
            assert list(path.glob(f"{name}.py")) or list(path.glob(name)), (
                f"the tour has {name} in {folder}: no such file"
            )
    listed = {folder.strip("`").rstrip("/") for folder, _, _ in tour}
    real = [p for p in (ROOT / "src" / "litseek").iterdir() if p.is_dir() and any(p.glob("*.py"))]
    real += [ROOT / name for name in ("conf", "experiments", "tests", "kernels/litseek_kernels")]
    missing = [str(p.relative_to(ROOT)) for p in real if str(p.relative_to(ROOT)) not in listed]
    assert not missing, f"not in the file tour: {missing}"


def test_stated_settings_have_the_stated_defaults():
    """Rows `key` (or `key` of stage) | `value`: the composed configuration, or the constructor's own default, says the same."""
    table = rows("What the report leaves open")
    assert len(table) > 10
    for question, setting, default in table:
        found = re.match(r"`([\w.]+)`(?:, stage=(\w+))?", setting)
        if found is None:
            assert setting == "fixed", f"{question}: name the setting, found {setting}"
            continue
        key, stage = found[1], found[2] or "pretrain"
        value = re.match(r"`([^`]+)`", default)
        assert value is not None, f"{question}: the default of {key} stands in backticks"
        needed = ("init_from=x",) if stage != "pretrain" else ()
        cfg = compose("train", (f"stage={stage}", *needed)).cfg
        given = OmegaConf.select(cfg, key, default=None)
        given = constructor_default(cfg, key) if given is None else given
        given = OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
        assert given == yaml.safe_load(value[1]), f"{key} of stage={stage} is {given}, the README says {value[1]}"


def constructor_default(cfg, key: str):
    import inspect

    from hydra.utils import get_object

    parent, _, name = key.rpartition(".")
    target = get_object(OmegaConf.select(cfg, parent)._target_)
    return inspect.signature(target).parameters[name].default


def test_models_have_the_stated_sizes():
    from litseek.models.config import DeepSeekV3Config

    for name, total, active, _ in rows("Models"):
        fields = yaml.safe_load((ROOT / "conf" / "model" / f"{name.strip('`')}.yaml").read_text(encoding="utf-8"))
        del fields["_target_"]
        cfg = DeepSeekV3Config(**fields)
        assert (rounded(cfg.num_params()), rounded(cfg.num_active_params())) == (total, active), name


def rounded(count: int) -> str:
    value, mark = (count / 1e9, "B") if count >= 0.5e9 else (count / 1e6, "M")
    return f"{float(f'{value:.3g}'):g}{mark}" if value >= 1 else f"{value:.2f}{mark}"
