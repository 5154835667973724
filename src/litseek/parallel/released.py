"""The released format rank by rank: no process holds more of the model than its own part (report §3.3, public README)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from torch import Tensor

from litseek.errors import LitseekError
from litseek.models.config import DeepSeekV3Config
from litseek.models.hf import (
    SHARD_SIZE,
    Held,
    Origin,
    ReleasedFolder,
    is_held,
    released_config,
    released_entries,
    written_folder,
)
from litseek.models.hf_config import write_json
from litseek.models.hf_files import Entry, plan_shards, shard_name, write_index, write_shard
from litseek.models.hf_layout import Piece as ReleasedPiece
from litseek.models.hf_layout import parameter_shapes, released_layout
from litseek.parallel.agree import Group, every, first, gather, rank_in
from litseek.parallel.pieces import Piece


def load_released(folder: Path, parameters: Mapping[str, Piece], group: Group = None) -> Origin:
    """Fill ``parameters`` (global name -> what this rank holds of it) from a folder; what to remember for `save_released`.

    Reads these tensors only, FP8 as code * scale. Errors, on every rank the same: LitseekError naming the file and
    tensor, or the parameter that the folder's model does not have in this shape.
    """

    def part() -> Origin:
        source = ReleasedFolder(folder)
        shapes = parameter_shapes(source.cfg)
        for name, piece in parameters.items():
            if name not in shapes:
                raise LitseekError(f"{folder}: the checkpoint has no '{name}', which the model needs.")
            if shapes[name] != tuple(piece.shape):
                raise LitseekError(
                    f"{folder}: '{name}' has shape {shapes[name]}, the model wants {tuple(piece.shape)}."
                )
        held = _held(parameters)
        source.fill(held)
        return source.origin_of(held)

    return every(part, group)


def save_released(
    cfg: DeepSeekV3Config,
    parameters: Mapping[str, Piece],
    folder: Path,
    dtype: str | None = None,
    origin: Origin | None = None,
    group: Group = None,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Write a released-format folder: each rank shards of what it ``writes``, the first one index and config.json.

    Experts may be spread along dim 0; of any other parameter one rank writes all. ``dtype`` and ``origin`` as in
    `litseek.models.hf.save_pretrained`. The folder appears whole or not at all. Errors, on every rank: LitseekError
    naming the folder; ValueError where the ranks together do not have every tensor exactly once.
    """
    known = origin or Origin()
    held = _held({name: piece for name, piece in parameters.items() if piece.written})

    def wanted(piece: ReleasedPiece) -> bool:
        return is_held(piece, held)

    def stored(piece: ReleasedPiece) -> Tensor:
        tensor, start = held[piece.param]
        index = piece.index if piece.expert is None else (piece.expert - start, *piece.index[1:])
        return tensor.detach()[index].cpu()

    def plan() -> list[list[Entry]]:
        for name, (tensor, _) in held.items():
            whole = parameters[name].shape
            if ".experts." not in name and tuple(tensor.shape) != tuple(whole):
                raise ValueError(f"'{name}' is held in part, {tuple(tensor.shape)} of {whole}: only experts may be.")
        return plan_shards(released_entries(cfg, stored, dtype, known, wanted), shard_size)

    shards = every(plan, group)
    names = gather(lambda: [[entry.name for entry in shard] for shard in shards], group)
    counts = first(lambda: _counted(cfg, names), group)
    before = sum(counts[: rank_in(group)])

    def write(fresh: Path) -> tuple[dict[str, str], int]:
        weight_map: dict[str, str] = {}
        try:
            for i, shard in enumerate(shards, start=before + 1):
                file = shard_name(i, sum(counts))
                write_shard(fresh / file, shard)
                weight_map |= {entry.name: file for entry in shard}
        except OSError as error:
            raise LitseekError(f"{folder} cannot be written: {error.strerror or error}") from error
        return weight_map, sum(entry.num_bytes for shard in shards for entry in shard)

    def finish(fresh: Path, written: list[tuple[dict[str, str], int]]) -> None:
        write_index(
            fresh, {name: file for files, _ in written for name, file in files.items()}, sum(n for _, n in written)
        )
        write_json(fresh / "config.json", released_config(cfg, dtype, known))
        target.close()

    with ExitStack() as target:  # only the first rank's holds the folder
        fresh = first(lambda: target.enter_context(written_folder(folder, replace=True)), group)
        written = gather(lambda: write(fresh), group)
        first(lambda: finish(fresh, written), group)


def _held(parameters: Mapping[str, Piece]) -> Held:
    return {name: (piece.tensor, piece.start) for name, piece in parameters.items()}


def _counted(cfg: DeepSeekV3Config, names: list[list[list[str]]]) -> list[int]:
    """Shards of each rank, after it was checked that all tensors are there once."""
    found = Counter(chain.from_iterable(chain.from_iterable(names)))
    for name in (piece.name for piece in released_layout(cfg, copies=False)):
        if found[name] != 1:
            raise ValueError(f"{name} is written by {found[name]} ranks, it must be one.")
    return [len(shards) for shards in names]
