"""What a person types reaches the program as typed; sweeps and lists keep their meaning."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from litseek.cli.compose import jobs
from litseek.cli.errors import Usage
from litseek.cli.overrides import expand, parse


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
@example("3 + 4 =")
@example("Hello, world")
@example("it's a \"quote\", isn't it?")
@example("cost: ${model.x} and \\${y} \\\\")
@example("a=b,c=[1,2] {x: y} # not a comment")
@example("null")
@example("???")
@example(" ")
@example("'")
def test_prompt_as_typed(text: str) -> None:
    (job,) = jobs("generate", parse(["checkpoint=runs/demo", f"prompt={text}"]))
    assert job.cfg.prompt == text


@pytest.mark.parametrize("path", ["runs/a,b", "runs/lr=0.1", "a b/c", "it's", "C:\\x\\", "[1]", "runs/{x}"])
def test_paths_as_typed(path: str) -> None:
    (job,) = jobs("convert", parse([f"source={path}", f"target={path}2"]))
    assert (job.cfg.source, job.cfg.target) == (path, f"{path}2")
    (job,) = jobs("train", parse(["-m", f"run_dir={path}"]))
    assert job.cfg.run_dir == path


def test_positional_folder() -> None:
    (job,) = jobs("report", parse(["experiments/balance"], positional="folder"))
    assert job.cfg.folder == "experiments/balance"
    with pytest.raises(Usage, match="'two' is neither"):
        parse(["one", "two"], positional="folder")


def test_lists_and_sweeps() -> None:
    assert expand(parse(["batch=[4,8]"])) == [("batch=[4,8]",)]
    assert expand(parse(["-m", "batch=[4,8]", "seed=0,1", "optim=adamw,muon"])) == [
        ("batch=[4,8]", f"seed={seed}", f"optim={optim}") for seed in (0, 1) for optim in ("adamw", "muon")
    ]
    assert expand(parse(["-m", "seed=range(3)"])) == [("seed=0",), ("seed=1",), ("seed=2",)]


def test_flags() -> None:
    request = parse(["--cfg", "-m", "seed=1,2"])
    assert request.show and request.multirun
