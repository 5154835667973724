"""Models in the released format: Hugging Face's DeepseekV3 folders, FP8 and BF16 (report §3.3, public README).

``load_pretrained`` and ``save_pretrained`` work in process; ``ReleasedFolder`` and ``released_entries`` give the
converter one tensor at a time, and a rank what it holds.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from litseek_kernels.ref.quantise import dequantise_block, quantise_block, requantise_block
from torch import Tensor

from litseek.errors import LitseekError
from litseek.models.config import DeepSeekV3Config
from litseek.models.hf_config import config_from_json, config_to_json, read_json, with_dtype, write_json
from litseek.models.hf_files import Entry, ShardReader, write_shards
from litseek.models.hf_layout import BIAS_SUFFIX, Piece, released_layout
from litseek.models.transformer import Transformer, build

FP8 = torch.float8_e4m3fn
SHARD_SIZE = 5_000_000_000
DTYPES = ("fp32", "bf16", "fp8")
Held = Mapping[str, tuple[Tensor, int]]
"""Our parameter's name -> the rows of it that are held, and the first one's number along dim 0 (of experts: which)."""


@dataclass
class Origin:
    """What the files said that the weights alone do not: how each tensor was stored, and the FP8 scales.

    With it, weights that were not trained go back to the same bytes. Keys are released names.
    """

    config: dict[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)


def load_pretrained(folder: str | Path, precision: Any = None) -> Transformer:
    """A model from a released-format folder; its ``origin`` remembers the files' dtypes and FP8 scales.

    Weights become float32 masters; FP8 is dequantised as code * scale, never rounded to BF16 on the way. LitseekError
    names the file and tensor where one is missing, damaged, unexpected or of another shape.
    """
    source = ReleasedFolder(Path(folder))
    model = build(source.cfg, precision)
    state = model.state_dict()
    unseen = set(state) - {piece.param for piece in source.pieces}
    assert not unseen, f"the layout has no place for {sorted(unseen)}"
    held = {name: (tensor, 0) for name, tensor in state.items()}
    source.fill(held)
    # nn.Module's own __setattr__ is for tensors and modules.
    model.__dict__["origin"] = source.origin_of(held)
    return model


def save_pretrained(
    model: Transformer, folder: str | Path, dtype: str | None = None, shard_size: int = SHARD_SIZE
) -> None:
    """Write ``model`` as a released-format folder.

    ``dtype``: fp32, bf16, fp8, or None to keep what each tensor had in the files that the model was loaded from
    (the parameters' own dtype where it was not loaded from any). The folder appears whole or not at all.
    """
    state = model.state_dict()
    origin = model.__dict__.get("origin") or Origin()
    with written_folder(Path(folder), replace=True) as fresh:
        entries = released_entries(model.cfg, lambda piece: state[piece.param][piece.index], dtype, origin)
        write_shards(fresh, entries, shard_size)
        write_json(fresh / "config.json", released_config(model.cfg, dtype, origin))


class StoredTensors(Mapping[str, Tensor]):
    """Some tensors of a folder under other names, read when they are asked for and not kept."""

    def __init__(self, read: Callable[[str], Tensor], names: Mapping[str, str]) -> None:
        self._read, self._names = read, names

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ReleasedFolder:
    """A released-format folder, checked: every tensor of the config's model is there with its shape and scales."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise LitseekError(f"{folder} is not a folder")
        self.folder, self.path = folder, folder / "config.json"
        self.raw = read_json(self.path)
        self.reader = ShardReader(folder)
        self.cfg = self._without_absent_mtp(config_from_json(self.raw, self.path))
        names = self.reader.info
        self.pieces = [p for p in released_layout(self.cfg) if not p.copy or p.name in names]
        for piece in self.pieces:
            self._check(piece)
        dtypes = {p.name: names[p.name][1] for p in self.pieces}
        scales = {p.name: p.scale_name for p in self.pieces if self._is_fp8(p)}
        self.origin = Origin(self.raw, dtypes, StoredTensors(self.reader.read, scales))
        expected = {p.name for p in self.pieces} | {p.scale_name for p in self.pieces if self._is_fp8(p)}
        unexpected = [n for n in names if n not in expected and not n.endswith("rotary_emb.inv_freq")]
        if unexpected:
            raise LitseekError(
                f"{self.reader.file_of(unexpected[0])} holds the tensor {unexpected[0]}, "
                f"which a model with the settings of {self.path} does not have"
            )

    def stored(self, piece: Piece) -> Tensor:
        """As in the file: FP8 codes stay codes."""
        return self.reader.read(piece.name)

    def weight(self, piece: Piece) -> Tensor:
        """As a number: FP8 becomes float32, code * scale."""
        stored = self.stored(piece)
        return dequantise_block(stored, self.reader.read(piece.scale_name)) if stored.dtype == FP8 else stored

    @torch.no_grad()
    def fill(self, held: Held) -> None:
        """Read what the parameters ``held`` are made of, and of the files nothing else."""
        for piece in self.pieces:
            if piece.param not in held:
                continue
            if piece.copy:
                self.check_copy(piece)
                continue
            tensor, first = held[piece.param]
            if piece.expert is None:
                tensor.copy_(self.weight(piece)[first : first + len(tensor)])
            elif is_held(piece, held):
                tensor[(piece.expert - first, *piece.index[1:])].copy_(self.weight(piece))

    def origin_of(self, held: Held) -> Origin:
        """What is to be remembered of these parameters, FP8 scales read."""
        names = {p.name for p in self.pieces if is_held(p, held)}
        scales = {name: self.origin.scales[name] for name in self.origin.scales if name in names}
        return replace(self.origin, scales=scales)

    def check_copy(self, piece: Piece) -> None:
        """MTP shares embedding and head; a folder that holds other ones beside them loses those, and is told so."""
        original = next(p for p in self.pieces if p.param == piece.param and not p.copy)
        if not torch.equal(self.weight(piece), self.weight(original)):
            warnings.warn(
                f"{self.reader.file_of(piece.name)}: {piece.name} differs from {original.name}, which MTP shares; "
                f"{original.name} is used",
                stacklevel=5,
            )

    def _is_fp8(self, piece: Piece) -> bool:
        return self.reader.info[piece.name][1] == FP8

    def _check(self, piece: Piece) -> None:
        if piece.name not in self.reader.info:
            raise LitseekError(f"{self.folder} lacks the tensor {piece.name}")
        self._check_shape(piece.name, piece.shape)
        if not self._is_fp8(piece):
            return
        if len(piece.shape) != 2:
            raise LitseekError(f"{self.reader.file_of(piece.name)}: {piece.name} is FP8, allowed for matrices only")
        if piece.scale_name not in self.reader.info:
            raise LitseekError(
                f"{self.reader.file_of(piece.name)}: {piece.name} is FP8 but {piece.scale_name} is missing"
            )
        self._check_shape(piece.scale_name, piece.scale_shape)
        dtype = self.reader.info[piece.scale_name][1]
        if dtype != torch.float32:
            file = self.reader.file_of(piece.scale_name)
            raise LitseekError(f"{file}: {piece.scale_name} is {dtype}, allowed is torch.float32")

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        found = self.reader.info[name][0]
        if found != wanted:
            raise LitseekError(
                f"{self.reader.file_of(name)}: {name} has shape {list(found)}, {self.path} makes it {list(wanted)}"
            )

    def _without_absent_mtp(self, cfg: DeepSeekV3Config) -> DeepSeekV3Config:
        """transformers writes num_nextn_predict_layers=1 but drops the layer when it saves: the files decide."""
        first = f"model.layers.{cfg.num_hidden_layers}."
        if not cfg.num_nextn_predict_layers or any(name.startswith(first) for name in self.reader.info):
            return cfg
        warnings.warn(
            f"{self.path} says num_nextn_predict_layers={cfg.num_nextn_predict_layers}, but the folder holds no tensor "
            f"of layer {cfg.num_hidden_layers}: the model is loaded without MTP",
            stacklevel=4,
        )
        self.raw = {**self.raw, "num_nextn_predict_layers": 0}
        return cfg.replace(num_nextn_predict_layers=0)


def is_held(piece: Piece, held: Held) -> bool:
    """Whether some of it is among these parameters' rows."""
    if piece.param not in held:
        return False
    tensor, first = held[piece.param]
    return piece.expert is None or first <= piece.expert < first + len(tensor)


def released_entries(
    cfg: DeepSeekV3Config,
    stored: Callable[[Piece], Tensor],
    dtype: str | None,
    origin: Origin,
    wanted: Callable[[Piece], bool] = lambda piece: True,
) -> Iterator[Entry]:
    """Every ``wanted`` tensor of the released layout, made when it is written.

    ``stored`` gives a piece as it is held: numbers, or FP8 codes whose scale is in ``origin.scales``. Numbers that have
    a scale there came from FP8: unchanged blocks go back to it.
    """
    for piece in released_layout(cfg):
        if not wanted(piece) or (piece.copy and origin.dtypes and piece.name not in origin.dtypes):
            continue
        target = target_dtype(piece, dtype, origin)
        if target != FP8:
            yield Entry(piece.name, piece.shape, target, partial(_numbers, piece, stored, origin.scales, target))
            continue
        quantised = _Quantised(piece, stored, origin.scales)
        yield Entry(piece.name, piece.shape, FP8, quantised.codes)
        yield Entry(piece.scale_name, piece.scale_shape, torch.float32, quantised.scale)


def target_dtype(piece: Piece, dtype: str | None, origin: Origin) -> torch.dtype:
    """How a piece is stored: the release keeps biases in float32 and all but the big matrices out of FP8.

    ``dtype=None`` keeps what the origin had; float32, the masters' own, where there is none.
    """
    if dtype is None:
        return origin.dtypes.get(piece.name, torch.float32)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not known: allowed are keep, {', '.join(DTYPES)}")
    if dtype == "fp32" or piece.name.endswith(BIAS_SUFFIX):
        return torch.float32
    return FP8 if dtype == "fp8" and piece.quantised else torch.bfloat16


def released_config(cfg: DeepSeekV3Config, dtype: str | None, origin: Origin) -> dict[str, Any]:
    """config.json: the source's own where it describes this model, with keys that we do not know kept."""
    if dtype is None:
        stored = set(origin.dtypes.values())
        kind = "fp8" if FP8 in stored else "bf16" if torch.bfloat16 in stored else "fp32"
    else:
        kind = dtype
    written = config_to_json(cfg, kind)
    as_written = config_from_json(written, Path("config.json"))
    if origin.config and config_from_json(origin.config, Path("config.json")) == as_written:
        return origin.config if dtype is None else with_dtype(origin.config, kind)
    unknown = {k: v for k, v in origin.config.items() if k not in ("rope_parameters", "dtype", "quantization_config")}
    return {**unknown, **written}


@contextmanager
def written_folder(target: Path, replace: bool) -> Iterator[Path]:
    """A folder that appears under ``target`` only when the block has ended well.

    An existing folder that is not empty is refused, or with ``replace`` has its weights and files replaced at the end.
    """
    if target.exists() and (not target.is_dir() or (not replace and any(target.iterdir()))):
        raise LitseekError(f"{target} exists already and is not an empty folder")
    fresh = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        target.mkdir(exist_ok=True)
        for old in [*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")]:
            old.unlink()
        for file in fresh.iterdir():
            file.replace(target / file.name)
    except OSError as error:
        raise LitseekError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


class _Quantised:
    """Codes and scales of one matrix, worked out once although they are two entries."""

    def __init__(self, piece: Piece, stored: Callable[[Piece], Tensor], scales: Mapping[str, Tensor]) -> None:
        self.piece, self.stored, self.scales = piece, stored, scales
        self._scale: Tensor | None = None

    def codes(self) -> Iterator[Tensor]:
        codes, self._scale = self._work()
        yield codes

    def scale(self) -> Iterator[Tensor]:
        scale, self._scale = self._scale, None
        yield self._work()[1] if scale is None else scale

    def _work(self) -> tuple[Tensor, Tensor]:
        stored, old = self.stored(self.piece), self.scales.get(self.piece.name)
        if old is None:
            return quantise_block(stored)
        return (stored, old) if stored.dtype == FP8 else requantise_block(stored.float(), old)


def _numbers(
    piece: Piece, stored: Callable[[Piece], Tensor], scales: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[Tensor]:
    held = stored(piece)
    yield dequantise_block(held, scales[piece.name], dtype) if held.dtype == FP8 else held.to(dtype)
