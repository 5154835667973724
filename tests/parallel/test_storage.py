"""Checkpoints on disk: what goes in comes out, and what is damaged, malicious or half written is refused."""

import errno
import hashlib
import json
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from litseek.errors import LitseekError
from litseek.parallel import pieces, storage

BASE = torch.arange(12.0).view(3, 4)
STATE = {
    "state_dict": {"layers.0.weight": BASE, "bias": torch.zeros(()), "empty": torch.empty(0, 3)},
    "shared": {"same": BASE, "row": BASE[1:], "turned": BASE.T, "half": BASE.bfloat16(), "ids": torch.arange(3)},
    "groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "big": math.inf, "none": None, "dtype": torch.bfloat16}],
    "by_number": {0: {"step": 3}, 1: torch.ones(2)},
    "numpy": np.arange(3),
}


def assert_equal(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    elif isinstance(expected, torch.Tensor | np.ndarray):
        expected = torch.as_tensor(expected)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        assert found == expected


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "checkpoints" / "step-00000001"
    storage.save(folder, STATE, {"hidden_size": 4}, "{}")
    return folder


def test_everything_comes_back(saved):
    assert_equal(storage.load(saved), STATE)
    assert storage.load(saved, "state_dict/")["state_dict"].keys() == STATE["state_dict"].keys()
    assert "same" not in storage.load(saved, "state_dict/")["shared"]
    assert storage.last(saved.parent) == saved
    assert (saved / "config.json").read_text() == '{\n  "hidden_size": 4\n}' and (saved / "tokenizer.json").is_file()
    assert not [path for path in saved.parent.iterdir() if path.name.startswith(".")]


def test_files_hold_no_pickle_and_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "SHARD", 100)
    storage.save(tmp_path / "a", {"x": [torch.full((20,), float(i)) for i in range(5)]})
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 5
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".json", ".safetensors"}
    assert [float(t[0]) for t in storage.load(tmp_path / "a")["x"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["model-00001-of-000001.safetensors", "state.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_damage_is_named(saved, name, damage):
    path = saved / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(bytes([content[0] ^ 255]) + content[1:])
    with pytest.raises(LitseekError, match=name.replace(".", r"\.")):
        storage.load(saved)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_malicious_pickle_is_never_opened(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    (saved / ".metadata").write_bytes(bomb)  # where torch.distributed.checkpoint's own format would look
    (saved / "__0_0.distcp").write_bytes(bomb)
    assert_equal(storage.load(saved), STATE)
    for name in ("model-00001-of-000001.safetensors", "state.json"):
        folder = tmp_path / name.partition(".")[0]
        storage.save(folder, STATE)
        (folder / name).write_bytes(bomb)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = [len(bomb), hashlib.sha256(bomb).hexdigest()]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(LitseekError, match="not a readable checkpoint"):
            storage.load(folder)
    assert not (tmp_path / "exploded").exists()


def test_files_outside_the_manifest_and_its_folder_are_refused(saved):
    (saved / "extra.safetensors").write_bytes(b"")
    with pytest.raises(LitseekError, match=r"extra\.safetensors: not named in the manifest"):
        storage.load(saved)
    (saved / "extra.safetensors").unlink()
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["../elsewhere"] = [0, ""]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LitseekError, match="elsewhere"):
        storage.load(saved)


@pytest.mark.parametrize("point", ["tensors", "state", "sync"])
def test_a_full_disk_is_told_and_harms_no_earlier_checkpoint(saved, monkeypatch, point):
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*args, **keys):
        raise full

    if point == "tensors":
        monkeypatch.setattr(pieces, "write_shard", refuse)
    else:
        monkeypatch.setattr(storage, "_write" if point == "state" else "_sync", refuse)
    for name in ("step-00000002", "step-00000001"):
        with pytest.raises(LitseekError, match=f"{name}: .*No space left on device.*earlier checkpoints are unharmed"):
            storage.save(saved.parent / name, STATE)
    monkeypatch.undo()
    assert storage.last(saved.parent) == saved
    assert_equal(storage.load(saved), STATE)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["last", "step-00000001"]


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match="cannot hold set at 'callbacks/mine'"):
        storage.save(tmp_path / "a", {"callbacks": {"mine": {1, 2}}})


def test_leftovers_of_a_killed_save_are_cleared_and_the_newest_kept(tmp_path):
    (tmp_path / ".step-00000001.partial").mkdir()
    for step in (1, 2, 3, 4):
        storage.save(tmp_path / f"step-{step:08d}", {"x": torch.zeros(1)})
    assert not (tmp_path / ".step-00000001.partial").exists()
    storage.keep_newest(tmp_path, 2)
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000003", "step-00000004"]
    storage.keep_newest(tmp_path, 0)
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_saving_over_a_checkpoint_replaces_it(saved):
    storage.save(saved, {"x": torch.ones(1)})
    assert storage.load(saved).keys() == {"x"}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["last", saved.name]


def test_killed_between_taking_the_old_one_away_and_putting_the_new_one_there(saved):
    aside = saved.parent / f".{saved.name}.replaced"
    saved.rename(aside)
    assert storage.last(saved.parent) == saved
    assert_equal(storage.load(saved), STATE)
    saved.rename(aside)
    storage.save(saved.parent / "step-00000002", STATE)
    assert_equal(storage.load(saved), STATE)
    assert not list(saved.parent.glob(".step-*"))


def test_random_state_goes_on_where_it_was(tmp_path):
    storage.save(tmp_path / "a", {"random": storage.random_state()})
    expected = (random.random(), np.random.rand(), torch.rand(3), random.gauss(0, 1), np.random.randn())
    storage.set_random_state(storage.load(tmp_path / "a")["random"])
    found = (random.random(), np.random.rand(), torch.rand(3), random.gauss(0, 1), np.random.randn())
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found, expected))
