"""`litseek convert`: between our checkpoints and the released layout, streaming, in memory of a few tensors."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from litseek_kernels.ref.quantise import dequantise_block
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from litseek.cli.errors import plain_warnings
from litseek.data.tokenizer import ASSISTANT, BOS, EOS, USER, Tokenizer
from litseek.data.tokenizer import load as load_tokenizer
from litseek.errors import LitseekError
from litseek.models.config import DeepSeekV3Config
from litseek.models.hf import (
    DTYPES,
    Origin,
    ReleasedFolder,
    StoredTensors,
    released_config,
    released_entries,
    written_folder,
)
from litseek.models.hf_config import write_json
from litseek.models.hf_files import Entry, write_shards
from litseek.models.hf_layout import Piece, by_parameter, parameter_shapes, released_layout
from litseek.parallel import storage
from litseek.parallel.checkpoint import resolve_checkpoint
from litseek.parallel.pieces import Stored
from litseek.parallel.tree import flatten, unflatten

WEIGHTS, RELEASED = "state_dict", "released"
"""Branches of a checkpoint: the weights, and what files in the released format said beside them."""
FORMATS = ("released", "checkpoint")
_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "generation_config.json"),
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}"
    f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}{{{{ '{USER}' + m['content'] }}}}"
    f"{{% elif m['role'] == 'assistant' %}}{{{{ '{ASSISTANT}' + m['content'] + eos_token }}}}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)
"""litseek.data.chat as a Jinja template, for other programs."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(cfg: DictConfig) -> None:
    options: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    keys = ("source", "target", "format", "dtype", "shard_size")
    with plain_warnings():
        print(convert(**{key: options[key] for key in keys}))


def convert(
    source: str, target: str, format: str = "released", dtype: str = "keep", shard_size: str | int = "5GB"
) -> str:
    """Convert, and say what was written. The target appears whole or not at all.

    Raises ValueError for a key's value, LitseekError for a missing or damaged source or a target that is taken.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format} is not known: allowed are {', '.join(FORMATS)}")
    if dtype != "keep" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not known: allowed are keep, {', '.join(DTYPES)}")
    if format == "checkpoint" and dtype not in ("keep", "fp32"):
        raise ValueError(f"dtype={dtype} does not go with format=checkpoint, which holds float32 masters")
    limit, folder = parse_size(shard_size), Path(target).expanduser()
    held = open_source(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LitseekError(f"{folder} exists already and is not an empty folder")
    if format == "released":
        _write_released(held, folder, None if dtype == "keep" else dtype, limit)
    else:
        _write_checkpoint(held, folder, limit)
    files = list(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return f"{folder}: {held.cfg.num_params():,} parameters, {size / 1e9:.3g} GB in {len(files)} files"


class Source(Protocol):
    """Weights on disk, a tensor at a time."""

    folder: Path
    cfg: DeepSeekV3Config
    origin: Origin

    def stored(self, piece: Piece) -> Tensor: ...


def open_source(path: str | Path) -> Source:
    ref = resolve_checkpoint(path)
    return ReleasedFolder(ref.path) if ref.released else CheckpointSource(ref.path, ref.config, ref.stage)


class CheckpointSource:
    """One of our checkpoints, checked against its manifest; ``stage`` wrote it, if one did."""

    def __init__(self, folder: Path, cfg: DeepSeekV3Config, stage: str | None) -> None:
        storage.verify(folder)
        self.folder, self.cfg, self.stage = folder, cfg, stage
        self.tensors = Stored(folder)
        tree = json.loads((folder / storage.STATE).read_text(encoding="utf-8")).get(RELEASED)
        released = unflatten({}, tree, partial=True) if tree else {}
        prefix = f"{RELEASED}/scales/"
        names = {name.removeprefix(prefix): name for name in self.tensors.names() if name.startswith(prefix)}
        scales = StoredTensors(self.tensors.tensor, names)
        self.origin = Origin(released.get("config", {}), released.get("dtypes", {}), scales)
        for param, shape in parameter_shapes(cfg).items():
            self._check(param, shape)

    def stored(self, piece: Piece) -> Tensor:
        name = f"{WEIGHTS}/{piece.param}"
        if piece.expert is None:
            return self.tensors.tensor(name)[piece.index]
        return self.tensors.read({name: (piece.expert, 1)})[name][0][piece.index[1:]]

    def _check(self, param: str, shape: tuple[int, ...]) -> None:
        name = f"{WEIGHTS}/{param}"
        if name not in self.tensors.found:
            raise LitseekError(f"{self.folder} lacks the tensor {name}")
        found = self.tensors.shape(name)
        if found != shape:
            raise LitseekError(f"{self.folder}: {name} has shape {list(found)}, its config makes it {list(shape)}")


def parse_size(size: str | int) -> int:
    """Bytes of ``5GB``, ``512MiB`` or a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or not float(match[1]) > 0:
        raise ValueError(f"shard_size={size} is not a size: allowed are a number of bytes, or 5GB, 512MiB and the like")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def _write_released(source: Source, target: Path, dtype: str | None, limit: int) -> None:
    tokenizer = _tokenizer(source) if isinstance(source, CheckpointSource) else None
    cfg = source.cfg if tokenizer is None else _with_token_ids(source.cfg, tokenizer)
    with written_folder(target, replace=False) as fresh:
        write_shards(fresh, released_entries(cfg, source.stored, dtype, source.origin), limit)
        write_json(fresh / "config.json", released_config(cfg, dtype, source.origin))
        if tokenizer is not None:
            assert isinstance(source, CheckpointSource)
            _write_tokenizer(tokenizer, cfg, fresh, chats=source.stage in (None, "sft", "grpo"))
            return
        for name in _COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, fresh / name)


def _write_checkpoint(source: Source, target: Path, limit: int) -> None:
    """Float32 masters, and the origin, so that what is not trained goes back to the same bytes."""
    cfg, origin = source.cfg, source.origin
    shapes = parameter_shapes(cfg)
    scale_shapes = {p.name: p.scale_shape for p in released_layout(cfg) if p.name in origin.scales}
    tree = flatten(
        {
            WEIGHTS: {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
            RELEASED: {
                "config": origin.config,
                "dtypes": dict(origin.dtypes),
                "scales": {name: torch.empty(shape, device="meta") for name, shape in scale_shapes.items()},
            },
        }
    )[1]

    def entries() -> Iterator[Entry]:
        for param, pieces in by_parameter(cfg).items():
            yield Entry(f"{WEIGHTS}/{param}", shapes[param], torch.float32, partial(_masters, source, pieces))
        for name, shape in scale_shapes.items():
            yield Entry(f"{RELEASED}/scales/{name}", shape, torch.float32, partial(_scale, origin.scales, name))

    tokenizer = source.folder / storage.TOKENIZER
    text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None
    if target.is_dir():
        target.rmdir()
    storage.write(target, tree, lambda folder: write_shards(folder, entries(), limit, index=False), cfg.to_dict(), text)


def _masters(source: Source, pieces: list[Piece]) -> Iterator[Tensor]:
    """One parameter of ours as float32 pieces, in the order of its memory."""
    for piece in pieces:
        held = source.stored(piece)
        yield (
            dequantise_block(held, source.origin.scales[piece.name])
            if held.dtype == torch.float8_e4m3fn
            else held.float()
        )


def _scale(scales: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    yield scales[name]


def _tokenizer(source: Source) -> Tokenizer | None:
    path = source.folder / storage.TOKENIZER
    if path.is_file():
        return load_tokenizer(path)
    warnings.warn(f"{source.folder} has no {storage.TOKENIZER}: the target gets none", stacklevel=2)
    return None


def _with_token_ids(cfg: DeepSeekV3Config, tokenizer: Tokenizer) -> DeepSeekV3Config:
    ids = tokenizer.control_ids
    return cfg.replace(bos_token_id=ids.get(BOS, cfg.bos_token_id), eos_token_id=ids.get(EOS, cfg.eos_token_id))


def _write_tokenizer(tokenizer: Tokenizer, cfg: DeepSeekV3Config, folder: Path, chats: bool) -> None:
    """tokenizer.json and what transformers and the servers read beside it."""
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model_max_length"] = cfg.max_position_embeddings
    if chats and {USER, ASSISTANT, BOS, EOS} <= tokenizer.control_ids.keys():
        settings["chat_template"] = CHAT_TEMPLATE
    write_json(path, settings)
    ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": cfg.eos_token_id}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
