"""Checkpoints of several ranks: pieces of uneven length, loaded by any other number of ranks; what fails fails everywhere."""

import errno
import os
import resource
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from litseek.errors import LitseekError
from litseek.parallel import pieces, storage
from litseek.parallel.pieces import Piece
from litseek.parallel.writer import CheckpointWriter
from tests.parallel.test_storage import assert_equal
from tests.ranks import ranks

SHAPES = {"wide": (7, 3), "long": (5,), "short": (2, 2, 2), "none": (0, 3), "thin": (4, 0), "one": ()}
WORLDS = (1, 2, 4)


def tensor(name):
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    values = torch.randn(SHAPES[name], generator=generator)
    return values.bfloat16() if name == "long" else values


def share(rows, world, rank):
    """ZeRO's: runs of ceil(rows / world), the last ones shorter or empty."""
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def group_of(world):
    return None if world == 1 else dist.group.WORLD


def state_of(world, rank):
    """Some tensors in pieces, one whole and written by the last rank, keys that only one rank has, numbers of rank 0."""
    weights = {}
    for name, shape in SHAPES.items():
        begin, end = share(shape[0], world, rank) if shape else (0, 1)
        whole = tensor(name)
        weights[name] = (
            Piece(whole[begin:end], begin, shape) if shape else Piece(whole, 0, (), writes=rank == world - 1)
        )
    moments = {"step": 3 + rank, "exp_avg": Piece(tensor("wide"), 0, SHAPES["wide"], writes=rank == 0)}
    own = {f"layer.{n}": {"step": n, "first": tensor("short") + n} for n in range(4) if n % world == rank}
    return {
        "weights": weights,
        "optimizer_states": [{"state": {"shared": moments, **own}, "param_groups": [{"lr": 0.1}]}],
        "rank": rank,
        "plain": torch.full((2,), float(rank)),
    }


def expected():
    own = {f"layer.{n}": {"step": n, "first": tensor("short") + n} for n in range(4)}
    return {
        "weights": {name: tensor(name) for name in SHAPES},
        "optimizer_states": [
            {"state": {"shared": {"step": 3, "exp_avg": tensor("wide")}, **own}, "param_groups": [{"lr": 0.1}]}
        ],
        "rank": 0,
        "plain": torch.zeros(2),
    }


def save(folder, world):
    rank = dist.get_rank() if world > 1 else 0
    storage.save(folder, state_of(world, rank), {"hidden_size": 4}, "{}", group=group_of(world))


def load(folder, world):
    """Everything; then this rank's share of the rows of the weights alone."""
    rank, group = (dist.get_rank() if world > 1 else 0), group_of(world)
    assert_equal(storage.load(folder, group=group), expected())

    def wanted(path, shape):
        begin, end = share(shape[0], world, rank) if shape else (0, 1)
        return (begin, end - begin) if path.startswith("weights/") and path != "weights/long" else None

    found = storage.load(folder, "weights/", wanted, group)
    assert "long" not in found["weights"] and "plain" not in found
    for name, part in found["weights"].items():
        begin, end = share(SHAPES[name][0], world, rank) if SHAPES[name] else (0, 1)
        assert_equal(part, tensor(name)[begin:end] if SHAPES[name] else tensor(name))


def run(world, function, *args):
    return [function(*args)] if world == 1 else ranks(world).run(function, *args)


@pytest.mark.parametrize("saved", WORLDS)
def test_what_any_number_of_ranks_saved_any_other_loads(tmp_path, saved):
    folder = tmp_path / "checkpoints" / "step-00000001"
    run(saved, save, folder, saved)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert storage.last(folder.parent) == folder and not list(folder.parent.glob(".*"))
    for world in WORLDS:
        run(world, load, folder, world)


def message(function, *args):
    try:
        function(*args)
    except LitseekError as error:
        return str(error)
    return None


def same_message(world, function, *args):
    found = set(ranks(world).run(message, function, *args))
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("damage", ["missing", "changed", "state", "manifest"])
def test_damage_is_told_by_every_rank_in_the_same_words(tmp_path, damage):
    run(2, save, tmp_path / "a", 2)
    name = {"state": "state.json", "manifest": "manifest.json"}.get(
        damage, "rank-00001-model-00001-of-000001.safetensors"
    )
    path = tmp_path / "a" / name
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    for world in (2, 4):
        found = same_message(world, load, tmp_path / "a", world)
        assert found is not None and name in found


def save_with_rank_1_out_of_room(folder):
    """Files of this process may not grow beyond a few bytes: the kernel itself refuses."""
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
    try:
        save(folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_disk_that_is_full_for_one_rank_stops_all_and_harms_nothing(tmp_path):
    run(2, save, tmp_path / "step-00000001", 2)
    for name in ("step-00000002", "step-00000001"):
        found = same_message(2, save_with_rank_1_out_of_room, tmp_path / name)
        assert f"{name}: the checkpoint could not be written (File too large)" in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000001"]
    run(2, load, tmp_path / "step-00000001", 2)


def save_rows_with_a_gap(folder):
    rank = dist.get_rank()
    storage.save(folder, {"x": Piece(torch.zeros(2), 3 * rank, (5,))}, group=dist.group.WORLD)


def save_what_cannot_be_stored(folder):
    storage.save(folder, {"x": {1, 2} if dist.get_rank() else 1}, group=dist.group.WORLD)


def save_two_things_of_one_name(folder):
    storage.save(folder, {"x": {"y": torch.zeros(1)} if dist.get_rank() else 1}, group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (save_rows_with_a_gap, "RuntimeError"),
        (save_what_cannot_be_stored, "TypeError: A checkpoint cannot hold set at 'x'"),
        (save_two_things_of_one_name, "ValueError: A checkpoint has no place for 'x/y'"),
    ],
)
def test_a_state_that_makes_no_checkpoint_is_refused_on_both(tmp_path, function, words):
    with pytest.raises(RuntimeError) as caught:
        ranks(2).run(function, tmp_path / "a")
    assert str(caught.value).count("\n" + words) >= 2
    assert list(tmp_path.iterdir()) == []


# -- in the background ------------------------------------------------------------------------------------------


def test_a_background_save_keeps_the_state_of_its_moment(tmp_path, monkeypatch):
    writer, go = CheckpointWriter(), threading.Event()
    real = pieces.write_shard

    def slow(*args):
        assert go.wait(30)
        real(*args)

    monkeypatch.setattr(pieces, "write_shard", slow)
    weight = torch.arange(6.0).view(2, 3)
    state = {
        "a": weight,
        "rows": Piece(weight[1:], 0, (1, 3)),
        "turned": weight.T,
        "n": 1,
        "half": weight.bfloat16()[0],
    }
    writer.save(tmp_path / "step-00000001", state)
    weight.zero_()
    assert storage.last(tmp_path) is None
    go.set()
    writer.finish()
    found, old = storage.load(tmp_path / "step-00000001"), torch.arange(6.0).view(2, 3)
    assert_equal(found, {"a": old, "rows": old[1:], "turned": old.T, "n": 1, "half": old.bfloat16()[0]})
    assert storage.last(tmp_path).name == "step-00000001"
    for step in (2, 3, 4):
        writer.save(tmp_path / f"step-{step:08d}", state, keep=2)
    writer.close()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("ending", ["save", "finish", "close"])
def test_an_error_in_the_background_surfaces_at_the_next_save_or_the_end(tmp_path, monkeypatch, ending):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = CheckpointWriter()
    writer.save(tmp_path / "step-00000001", {"a": torch.zeros(2)})
    writer.finish()
    monkeypatch.setattr(pieces, "write_shard", refuse)
    writer.save(tmp_path / "step-00000002", {"a": torch.zeros(2)})
    with pytest.raises(LitseekError, match=r"step-00000002: .*No space left on device"):
        if ending == "save":
            writer.save(tmp_path / "step-00000003", {"a": torch.zeros(2)})
        else:
            getattr(writer, ending)()
    assert storage.last(tmp_path).name == "step-00000001"
    assert len(list(tmp_path.iterdir())) == 2


def train_beside_saving(folder, world):
    """Collectives of the training go on while the threads' own run."""
    writer, rank = CheckpointWriter(group=dist.new_group(backend="gloo")), dist.get_rank()
    for step in range(3):
        writer.save(folder / f"step-{step:08d}", state_of(world, rank))
        for _ in range(20):
            total = torch.ones(3)
            dist.all_reduce(total)
            assert total[0] == world
    writer.close()


def fail_beside_training(folder):
    writer = CheckpointWriter(group=dist.new_group(backend="gloo"))
    real = pieces.write_shard

    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if dist.get_rank() == 1:
        pieces.write_shard = refuse
    try:
        writer.save(folder, state_of(2, dist.get_rank()))
        dist.all_reduce(torch.ones(1))
        writer.close()
    finally:
        pieces.write_shard = real


def test_background_saves_of_several_ranks(tmp_path):
    ranks(4).run(train_beside_saving, tmp_path, 4)
    for step in range(3):
        load(tmp_path / f"step-{step:08d}", 1)
    found = same_message(2, fail_beside_training, tmp_path / "step-00000009")
    assert "step-00000009: the checkpoint could not be written (No space left on device)" in found
    assert storage.last(tmp_path).name == "step-00000002" and len(list(tmp_path.iterdir())) == 4


def test_killed_while_the_thread_writes(tmp_path):
    """SIGKILL at any moment leaves the former checkpoint; the next save clears what lies around."""
    pid = os.fork()
    if pid == 0:
        try:
            writer = CheckpointWriter()
            for step in range(100):
                writer.save(tmp_path / f"step-{step:08d}", {"a": torch.full((2**18,), float(step))})
        finally:
            os._exit(1)
    end = time.monotonic() + 30
    while not (tmp_path / "step-00000001").is_dir() and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    newest = storage.last(tmp_path)
    assert newest is not None and storage.load(newest)["a"][0] == int(newest.name[5:])
    storage.save(tmp_path / "step-00000200", {"a": torch.zeros(1)})
    assert not list(tmp_path.glob(".*"))


@pytest.mark.gpu
def test_copies_from_a_gpu_wait_for_what_was_queued_before_them(tmp_path):
    writer, weight = CheckpointWriter(), torch.zeros(2**20, device="cuda")
    for step in range(3):
        weight += 1
        writer.save(tmp_path / f"step-{step:08d}", {"a": weight, "rows": Piece(weight[5:9], 0, (4,))})
        weight += 1
    writer.close()
    for step in range(3):
        found = storage.load(tmp_path / f"step-{step:08d}")
        assert (found["a"] == 2 * step + 1).all() and (found["rows"] == 2 * step + 1).all()
