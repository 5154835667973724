"""The released format rank by rank: experts and layers over ranks, the same as one process reads and writes."""

import json

import pytest
import torch
import torch.distributed as dist

from litseek.cli.convert import convert
from litseek.errors import LitseekError
from litseek.models.hf import Origin, load_pretrained, save_pretrained
from litseek.models.hf_files import ShardReader
from litseek.parallel import storage
from litseek.parallel.checkpoint import fill, resolve_checkpoint
from litseek.parallel.pieces import Piece
from litseek.parallel.released import load_released, save_released
from tests.models.test_hf import assert_same_files, config, released_folder, tensors, tiny
from tests.ranks import ranks

LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]
"""(pipeline stages, ranks that share the experts)."""


def held(state, layout, rank):
    """What a rank has: of two stages the first has embedding, head and layer 0, as in DualPipeV; experts by halves."""
    pp, ep = layout
    stage, share = divmod(rank, ep)
    pieces = {}
    for name, tensor in state.items():
        first = not name.startswith(("layers.1", "mtp"))
        if pp == 2 and first != (stage == 0):
            continue
        if ".experts." in name:
            size = len(tensor) // ep
            pieces[name] = Piece(tensor[share * size : (share + 1) * size].clone(), share * size, tuple(tensor.shape))
        else:
            pieces[name] = Piece(tensor.clone(), 0, tuple(tensor.shape), writes=share == 0)
    return pieces


def place(layout):
    world = layout[0] * layout[1]
    return (dist.get_rank(), dist.group.WORLD) if world > 1 else (0, None)


def run(layout, function, *args):
    world = layout[0] * layout[1]
    return [function(*args)] if world == 1 else ranks(world).run(function, *args)


def blank(layout, rank):
    return held({name: torch.full_like(t, torch.nan) for name, t in tiny().state_dict().items()}, layout, rank)


def there_and_back(source, target, layout, dtype):
    rank, group = place(layout)
    read = []
    real = ShardReader.read

    def watched(self, name, index=None):
        read.append(name)
        return real(self, name, index)

    ShardReader.read = watched
    try:
        parameters = blank(layout, rank)
        origin = load_released(source, parameters, group)
    finally:
        ShardReader.read = real
    whole = load_pretrained(source).state_dict()
    for name, piece in parameters.items():
        begin, length = piece.rows
        assert torch.equal(piece.tensor, whole[name][begin : begin + length]), name
    save_released(config(), parameters, target, dtype, origin, group, shard_size=20_000)
    return set(read)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_round_trip_over_ranks_keeps_every_byte(tmp_path, layout, dtype):
    source = released_folder(tmp_path / "source", dtype)
    read = run(layout, there_and_back, source, tmp_path / "target", layout, None)
    assert_same_files(source, tmp_path / "target")
    assert json.loads((tmp_path / "target/config.json").read_text()) == json.loads((source / "config.json").read_text())
    total = json.loads((tmp_path / "target/model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(t.nbytes for t in tensors(source).values())
    assert not list(tmp_path.glob("*.partial"))
    if layout == (2, 2):
        experts = [{name for name in names if ".experts." in name} for names in read]
        assert experts[0] == experts[1] == set() and not experts[2] & experts[3] and experts[2] and experts[3]
        assert not any("layers.0." in name for name in read[2]) and any("layers.0." in name for name in read[0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_other_dtypes_are_as_one_process_writes_them(tmp_path, dtype):
    source = released_folder(tmp_path / "source", "fp8")
    run((2, 2), there_and_back, source, tmp_path / "ours", (2, 2), dtype)
    save_pretrained(load_pretrained(source), tmp_path / "theirs", dtype)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def export(folder, layout, change):
    rank, group = place(layout)
    parameters = held(tiny().state_dict(), layout, rank)
    if change == "twice":
        parameters = {n: Piece(p.tensor, p.start, p.shape, writes=True) for n, p in parameters.items()}
    if change == "missing" and rank == 0:
        del parameters["norm.weight"]
    if change == "part" and rank == 0:
        parameters["norm.weight"] = Piece(parameters["norm.weight"].tensor[:3], 0, (40,))
    save_released(config(), parameters, folder, None, Origin(), group)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("twice", "is written by 2 ranks, it must be one"),
        ("missing", r"model\.norm\.weight is written by 0 ranks"),
        ("part", r"'norm\.weight' is held in part, \(3,\) of \(40,\): only experts may be"),
    ],
)
def test_ranks_that_do_not_make_up_a_model_are_refused(tmp_path, change, words):
    with pytest.raises(RuntimeError, match=words):
        ranks(2).run(export, tmp_path / "m", (1, 2), change)
    assert list(tmp_path.iterdir()) == []


def message(function, *args):
    try:
        function(*args)
    except LitseekError as error:
        return str(error)
    return None


def test_a_folder_that_cannot_be_written_or_read_is_told_by_every_rank(tmp_path):
    (tmp_path / "taken").write_text("a file")
    (found,) = set(ranks(2).run(message, export, tmp_path / "taken", (1, 2), None))
    assert "taken exists already" in found and (tmp_path / "taken").read_text() == "a file"
    source = released_folder(tmp_path / "source", "bf16")
    next(source.glob("*.safetensors")).write_bytes(b"short")
    (found,) = set(ranks(2).run(message, there_and_back, source, tmp_path / "target", (1, 2), None))
    assert "is damaged or truncated" in found


def fill_from(path, layout):
    rank, group = place(layout)
    parameters = blank(layout, rank)
    fill(config(), parameters, resolve_checkpoint(path), group)
    whole = tiny().state_dict()
    for name, piece in parameters.items():
        begin, length = piece.rows
        assert torch.equal(piece.tensor, whole[name][begin : begin + length]), name


def save_own(folder, layout):
    """A checkpoint with its weights alone."""
    rank, group = place(layout)
    storage.save(folder, {"state_dict": held(tiny().state_dict(), layout, rank)}, config().to_dict(), group=group)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_from_either_format_onto_any_layout(tmp_path, layout):
    save_pretrained(tiny(), tmp_path / "released")
    run((2, 2), save_own, tmp_path / "four", (2, 2))
    save_own(tmp_path / "one", (1, 1))
    for source in ("released", "four", "one"):
        run(layout, fill_from, tmp_path / source, layout)


def test_convert_reads_what_several_ranks_saved(tmp_path):
    ranks(4).run(save_own, tmp_path / "four", (2, 2))
    with pytest.warns(UserWarning, match="has no tokenizer"):
        convert(str(tmp_path / "four"), str(tmp_path / "ours"), dtype="bf16")
    save_pretrained(tiny(), tmp_path / "theirs", "bf16")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
