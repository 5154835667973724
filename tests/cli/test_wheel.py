"""A wheel built from the tree and unpacked into an empty folder finds its conf/."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from litseek.cli.compose import conf_dir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("litseek-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_every_configuration(installed: Path) -> None:
    def names(conf: Path) -> set[str]:
        return {path.relative_to(conf).as_posix() for path in conf.rglob("*.yaml")}

    assert names(installed / "litseek" / "conf") == names(conf_dir())
    assert (installed / "litseek_kernels" / "__init__.py").is_file()


def test_wheel_composes_without_the_repository(installed: Path, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    program = "import litseek, sys; from litseek.cli.__main__ import main; print(litseek.__file__); sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program, "train", "preset=smoke", "stage=context_32k", "init_from=x", "--cfg"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed)) and "max_position_embeddings: 256" in done.stdout
