"""Byte-level BPE with the released pre-tokenizer (report §4.1): training, loading, control tokens, random splitting.

The release names its control tokens; ours bear the same names, so that one chat template and one FIM format serve both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from litseek.errors import LitseekError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CONTROL = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT)

CJK_RUN = "[一-龥぀-ゟ゠-ヿ]+"
WORD_OR_PUNCTUATION = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"  # one sign in front of a Latin word
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"  # a word with the space before it
    r"| ?[\p{P}\p{S}]+[\r\n]*"  # signs, joined with the line breaks after them
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pre-tokenizer's last pattern, as in the released tokenizer.json."""


class Tokenizer:
    """Text to ids and back, and the ids of the control tokens.

    ``encode`` never yields a control token: text that spells one out is plain text. Chat and FIM put them in by id.
    """

    def __init__(self, raw: tokenizers.Tokenizer, source: str = "tokenizer"):
        self.raw, self.source = raw, source
        raw.no_padding()
        raw.no_truncation()
        known = raw.get_vocab(with_added_tokens=True)
        self.vocab_size = max(known.values()) + 1
        """Highest id + 1 (the release: 128815); the model's embedding may be larger, never smaller."""
        self._control = {name: known[name] for name in CONTROL if name in known}
        spec = json.loads(raw.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in CONTROL and not t["special"]]
        spec["post_processor"] = None
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec))

    # -- ids of control tokens

    def control(self, name: str) -> int:
        """The id of a control token, or an error that names the tokenizer that lacks it."""
        if name not in self._control:
            raise ValueError(f"{self.source} has no token {name}, which this data needs.")
        return self._control[name]

    @property
    def bos_id(self) -> int:
        return self.control(BOS)

    @property
    def eos_id(self) -> int:
        return self.control(EOS)

    @property
    def pad_id(self) -> int:
        return self._control.get(PAD, self.eos_id)

    @property
    def user_id(self) -> int:
        return self.control(USER)

    @property
    def assistant_id(self) -> int:
        return self.control(ASSISTANT)

    @property
    def control_ids(self) -> dict[str, int]:
        return dict(self._control)

    # -- text

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of these ids; control tokens are left out unless asked for. Broken UTF-8 shows as U+FFFD."""
        ids = [int(i) for i in ids]
        if skip_special:
            hidden = set(self._control.values())
            ids = [i for i in ids if i not in hidden]
        return self.raw.decode(ids, skip_special_tokens=skip_special)

    # -- random splitting of joined tokens

    @cached_property
    def joined(self) -> dict[int, tuple[list[int], list[int]]]:
        """Tokens that join punctuation and line breaks -> (ids of the punctuation, ids of the line breaks)."""
        pieces = {}
        for token, i in self._plain.get_vocab(with_added_tokens=False).items():
            text = self.raw.decoder.decode([token]) if self.raw.decoder else token
            head = text.rstrip("\r\n")
            if head == text or not head.strip() or "\ufffd" in text or any(c.isalnum() or c in "\r\n" for c in head):
                continue
            pieces[i] = (head, text[len(head) :])
        ids = {p: self.encode(p) for pair in pieces.values() for p in pair}
        return {i: (ids[a], ids[b]) for i, (a, b) in pieces.items()}

    def split_joined(self, ids: Sequence[int], rate: float, rng: np.random.Generator) -> np.ndarray:
        """Splits each joined token with probability ``rate`` (report §4.1: against token-boundary bias)."""
        array = np.asarray(ids, dtype=np.int64)
        if rate <= 0 or not self.joined:
            return array
        at = np.flatnonzero(np.isin(array, np.fromiter(self.joined, dtype=np.int64)))
        at = at[rng.random(len(at)) < rate]
        parts, start = [], 0
        for position in at.tolist():
            head, breaks = self.joined[int(array[position])]
            parts += [array[start:position], np.asarray(head + breaks, dtype=np.int64)]
            start = position + 1
        return np.concatenate([*parts, array[start:]])

    # -- files and checks

    def save(self, folder: Path) -> Path:
        """Writes ``tokenizer.json`` and a ``tokenizer_config.json`` that transformers reads into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tokenizer.json"
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for key, name in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD)):
            if name in self._control:
                config[key] = name
        for target, text in (
            (path, self.raw.to_str()),
            (folder / "tokenizer_config.json", json.dumps(config, indent=2)),
        ):
            draft = target.with_name(f".{target.name}.{os.getpid()}")
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, target)
        return path

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's content: part of every cache key and receipt."""
        return hashlib.sha256(self.raw.to_str().encode()).hexdigest()

    def check_fits(self, vocab_size: int) -> None:
        """Refuses a tokenizer that is larger than the model's embedding; a smaller one is normal (PAPER §6)."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"{self.source} has {self.vocab_size} tokens, more than model.vocab_size={vocab_size}; "
                "a smaller tokenizer or a larger model.vocab_size is needed."
            )


def load(path: str | Path) -> Tokenizer:
    """A ``tokenizer.json``, plain or .gz, or a folder that holds one."""
    import gzip

    given = Path(path).expanduser()
    candidates = [given / "tokenizer.json", given / "tokenizer.json.gz"] if given.is_dir() else [given]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise LitseekError(f"{given}: no tokenizer.json there.")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return Tokenizer(tokenizers.Tokenizer.from_buffer(data), source=str(file))
    except Exception as e:  # the Rust side raises bare Exception
        raise LitseekError(f"{file}: not a tokenizer ({e}).") from e


def train(texts: Iterable[str], vocab_size: int, digits: int = 3) -> Tokenizer:
    """Byte-level BPE with exactly ``vocab_size`` ids at most: 256 bytes, the control tokens, the rest merges.

    ``digits``: numbers are cut into groups of at most this many digits; the release has 3, and 1 makes each digit a
    token of its own, which small models need for arithmetic.
    """
    least = 256 + len(CONTROL)
    if vocab_size < least:
        raise ValueError(
            f"data.vocab_size={vocab_size} is too small: 256 bytes and {len(CONTROL)} control tokens need {least}."
        )
    if digits < 1:
        raise ValueError(f"data.digits={digits} must be at least 1.")
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(
                pre_tokenizers.Split(Regex(pattern), behavior="isolated")
                for pattern in (rf"\p{{N}}{{1,{digits}}}", CJK_RUN, WORD_OR_PUNCTUATION)
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(CONTROL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return Tokenizer(raw, source="trained tokenizer")
