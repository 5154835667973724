"""The program's edges: help, exit status, one sentence on stderr, a traceback only when asked for."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from litseek.cli.__main__ import COMMANDS, main
from litseek.cli.errors import describe
from litseek.errors import LitseekError


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def test_help_lists_commands_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "Examples" in out
    for name, command in COMMANDS.items():
        assert f"  {name}" in out and command.line in out
    assert run(capsys)[0] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and out.startswith(f"litseek {command}: ") and "Keys" in out


@pytest.mark.parametrize(
    ("argv", "status", "sentence"),
    [
        (["trian"], 2, "'trian' is not a command; did you mean train?"),
        (["train", "stage.btach=3"], 2, "stage.btach=3: there is no key 'stage.btach'; did you mean stage.batch?"),
        (["train", "model.n_group=3"], 1, "model.n_group=3 does not divide model.n_routed_experts=8."),
        (["train", "data.seq_len=512"], 1, "data.seq_len=512 exceeds model.max_position_embeddings=256"),
        (["train", "stage=sft", "init_from=nowhere"], 1, "nowhere: no such checkpoint"),
        (["pipeline", "preset=smoke", "grpo.stage.group=5"], 1, "stage.batch=16 is not a multiple of stage.group=5."),
        (
            ["pipeline", "preset=smoke", "grpo.stage.batch=12"],
            1,
            "stage.batch=12 is not a multiple of stage.micro_batch=16.",
        ),
        (
            ["pipeline", "preset=smoke", "sft.model.hidden_size=48"],
            1,
            "model.hidden_size=48 does not fit the checkpoint",
        ),
        (["pipeline", "preset=smoke", "sft.data.seq_len=512"], 1, "stage=sft: data.seq_len=512 exceeds"),
        (["train", "-m", "preset=smoke", "model.n_group=1,3"], 1, "model.n_group=3 does not divide"),
        (["train", "trainer.accumulate_grad_batches=2", "preset=smoke"], 1, "trainer.accumulate_grad_batches=2"),
        (["train", "trainer.max_steps=0"], 1, "trainer.max_steps=0: nothing would be trained."),
        (["train", "stage.batch=[4,8]"], 1, "stage.batch=[4, 8] must be a number of sequences"),
        (["train", "strategy.recompute=[atend]"], 1, "strategy.recompute names 'atend': allowed are attend, dispatch"),
        (["train", "seed=-1"], 1, "seed=-1 must be an integer from 0"),
        (["train", "model.rms_norm_eps=-1"], 1, "model.rms_norm_eps=-1 must be a number"),
        (["train", "model.rope_scaling={factor:abc}"], 1, "model.rope_scaling.factor='abc' must be a number"),
        (["generate", "checkpoint=nowhere", "max_tokens=4.5"], 2, "max_tokens=4.5 is not an integer."),
        (["train", "trainer.precision=16-mixed", "preset=smoke"], 1, "precision"),
        (["generate", "checkpoint=nowhere", "prompt=x"], 1, "nowhere: no such checkpoint"),
    ],
)
def test_mistakes_end_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    argv: list[str], status: int, sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITSEEK_CACHE", str(tmp_path / "cache"))
    extra = ["logger=none"] if argv[0] in ("train", "pipeline") else []
    found, out, err = run(capsys, *argv, *extra)
    assert found == status
    assert err.startswith("litseek: ") and sentence in err and err.count("\n") == 1
    assert "Traceback" not in err + out
    assert not (tmp_path / "outputs").exists() and not list(tmp_path.glob("runs/*/*/checkpoints/*"))


def test_traceback_only_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="n_group"):
        main(["train", "model.n_group=3", "debug=true"])
    monkeypatch.setenv("LITSEEK_DEBUG", "1")
    with pytest.raises(ValueError, match="n_group"):
        main(["train", "model.n_group=3"])
    assert run(capsys, "train", "model.n_group=3", "debug=false")[0] == 1


def test_show_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "train", "--cfg", "seed=7")
    assert status == 0 and "seed: 7" in out and "_target_: litseek.stages.pretrain.Pretrain" in out


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("a.b=1 is too small"), "a.b=1 is too small."),
        (LitseekError("x.json: damaged."), "x.json: damaged."),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), "the disk is full while writing x/y; earlier"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "x/y"), "x/y: permission denied."),
        (json.JSONDecodeError("Expecting value", "{", 1), "Expecting value: line 1 column 2 (char 1)."),
        (
            ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"),
            "the Python package 'lm_eval' is not installed",
        ),
        (TypeError("two\nlines"), "unexpected TypeError: two lines (debug=true shows where)."),
    ],
)
def test_errors_become_one_sentence(error: Exception, sentence: str) -> None:
    assert describe(error).startswith(sentence)
    assert "\n" not in describe(error)


def test_waiting_threads_are_told_to_sleep_before_torch_loads() -> None:
    program = "import sys, litseek.cli.__main__ as m; assert 'torch' not in sys.modules; m.main(['--help']); import os; print(os.environ['OMP_WAIT_POLICY'])"
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.endswith("PASSIVE\n"), done.stderr
