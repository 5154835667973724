"""`litseek generate`: one answer, a file of prompts, or a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from litseek.cli.check import check_values
from litseek.cli.errors import plain_warnings
from litseek.data import chat as chat_template
from litseek.data.tokenizer import BOS, EOS, USER, Tokenizer
from litseek.data.tokenizer import load as load_tokenizer
from litseek.errors import LitseekError
from litseek.inference.engine import Engine, Sampling
from litseek.models.hf_config import read_json
from litseek.parallel.checkpoint import CheckpointRef, load_model, resolve_checkpoint
from litseek.precision import BF16, FP32

CHATS = ("sft", "grpo")
"""Stages whose models were taught the chat template."""
_PRECISIONS = {"fp32": FP32, "bf16": BF16}


def run(cfg: DictConfig) -> None:
    options: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    if options["prompt"] is not None and options["input_file"] is not None:
        raise ValueError("prompt and input_file are both set: allowed is one of them")
    if options["output_file"] is not None and options["input_file"] is None:
        raise ValueError("output_file is set but input_file is not: allowed are both, or neither")
    sampling = {key: options[key] for key in ("max_tokens", "temperature", "top_p", "seed")}
    check_values(Sampling, {key: (key, value) for key, value in sampling.items()})
    Sampling(**sampling)  # refuses impossible values before a model is loaded
    prompts = None if options["input_file"] is None else read_prompts(Path(options["input_file"]).expanduser())
    with plain_warnings():
        speaker = Speaker.load(resolve_checkpoint(options["checkpoint"]), options)
    speaker.sampling = Sampling(**sampling, stop=speaker.stop_ids())
    if prompts is not None:
        output = options["output_file"]
        answer_file(speaker, prompts, options["batch"], None if output is None else Path(output).expanduser())
    elif options["prompt"] is not None:
        show(speaker.answer(speaker.first(options["prompt"])), options["stream"])
    else:
        converse(speaker, options["stream"])


@dataclass
class Speaker:
    """A model, its tokenizer, and how it wants to be asked."""

    engine: Engine
    tokenizer: Tokenizer
    chats: bool
    system: str | None
    sampling: Sampling

    @classmethod
    def load(cls, ref: CheckpointRef, options: dict[str, Any]) -> Speaker:
        if ref.tokenizer is None:
            raise LitseekError(f"{ref.path} has no tokenizer.json, and text needs one")
        tokenizer = load_tokenizer(ref.tokenizer)
        tokenizer.check_fits(ref.config.vocab_size)
        chats = speaks(ref) if options["chat"] is None else options["chat"]
        if options["system"] is not None and not chats:
            raise ValueError(f"system={options['system']} needs the chat template, and chat is false for {ref.path}")
        device = pick_device(options["device"])
        model = load_model(ref, pick_precision(options["precision"], device)).to(device).eval()
        return cls(Engine(model, options["absorbed"]), tokenizer, chats, options["system"], Sampling())

    def first(self, prompt: str) -> list[int]:
        """Ids of a prompt that begins a conversation or a text."""
        return self.ids([{"role": "user", "content": prompt}]) if self.chats else self.plain(prompt)

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return chat_template.encode_prompt([*system, *messages], self.tokenizer)

    def plain(self, prompt: str) -> list[int]:
        """The text after the token that begins every document in training, where the tokenizer has it."""
        begin = self.tokenizer.control_ids.get(BOS)
        return [*([] if begin is None else [begin]), *self.tokenizer.encode(prompt)]

    def stop_ids(self) -> tuple[int, ...]:
        """End of text; in a conversation also the token by which the model would speak for the user."""
        names = (EOS, USER) if self.chats else (EOS,)
        ids = tuple(self.tokenizer.control_ids[name] for name in names if name in self.tokenizer.control_ids)
        return ids or (self.engine.model.cfg.eos_token_id,)

    def answer(self, prompt: list[int], turn: int = 0) -> Iterator[str]:
        """Text as it comes, cut where characters are whole; ``turn`` picks the stream of random numbers."""
        done, ids = "", []
        for token in self.engine.stream(prompt, self.sampling, index=turn):
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd") and len(text) > len(done):
                yield text[len(done) :]
                done = text
        yield self.tokenizer.decode(ids)[len(done) :]


def show(pieces: Iterator[str], stream: bool) -> str:
    """Print an answer, while it comes or at once, and return it."""
    text = ""
    for piece in pieces:
        text += piece
        if stream:
            print(piece, end="", flush=True)
    print("" if stream else text, flush=True)
    return text


def converse(speaker: Speaker, stream: bool) -> None:
    """Read lines until /exit or the end of input. Without the chat template each line is a text to continue."""
    asked = sys.stdin.isatty()
    kind = "Conversation" if speaker.chats else "This model continues text; each line stands alone"
    print(f"{kind}. /exit ends it{', /new starts afresh' if speaker.chats else ''}.", flush=True)
    messages: list[dict[str, str]] = []
    turn = 0
    while True:
        try:
            line = input("> " if asked else "")
        except EOFError:
            return
        if line.strip() == "/exit":
            return
        if line.strip() == "/new":
            messages = []
            continue
        if not line.strip():
            continue
        try:
            if speaker.chats:
                messages.append({"role": "user", "content": line})
                prompt = _fitting(speaker, messages)
            else:
                prompt = speaker.plain(line)
            text = show(speaker.answer(prompt, turn), stream)
            if speaker.chats:
                messages.append({"role": "assistant", "content": text})
            turn += 1
        except LitseekError as error:
            print(error, file=sys.stderr, flush=True)
            messages = []


def _fitting(speaker: Speaker, messages: list[dict[str, str]]) -> list[int]:
    """Ids of the conversation; its oldest turns are dropped, and that is said, when the model's range is full."""
    limit, dropped = speaker.engine.model.cfg.max_position_embeddings, 0
    while len(ids := speaker.ids(messages)) >= limit and len(messages) > 1:
        del messages[:2]
        dropped += 1
    if dropped:
        print(f"({dropped} oldest turns forgotten: the model sees {limit} tokens)", file=sys.stderr, flush=True)
    return ids


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """(line number, prompt) of each line that is not blank. Lines end at "\\n" alone."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise LitseekError(f"input_file={path} does not exist") from None
    except UnicodeDecodeError as error:
        raise LitseekError(f"input_file={path} is not UTF-8 text: {error}") from None
    prompts = [(n, line.removesuffix("\r")) for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise LitseekError(f"input_file={path} has no prompt in it: one a line is wanted")
    return prompts


def answer_file(speaker: Speaker, prompts: list[tuple[int, str]], batch: int, output: Path | None) -> None:
    """Answers in the order of the prompts, as JSON lines into ``output`` or as text to stdout."""
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    encoded = [speaker.first(prompt) for _, prompt in prompts]
    limit = speaker.engine.model.cfg.max_position_embeddings
    for (line, _), ids in zip(prompts, encoded, strict=True):
        if len(ids) >= limit:
            raise LitseekError(
                f"line {line} of the prompts has {len(ids)} tokens, and the model's range is {limit} positions"
            )
    sink = None if output is None else output.open("w", encoding="utf-8")
    try:
        for start in range(0, len(prompts), batch):
            out = speaker.engine.generate(
                encoded[start : start + batch], speaker.sampling, first=start, max_batch=batch
            )
            stopped = out.stopped.tolist()
            for i, ids in enumerate(out.lists()):
                prompt, text = prompts[start + i][1], speaker.tokenizer.decode(ids)
                if sink is None:
                    print(f"> {prompt}\n{text}", flush=True)
                else:
                    row = {"prompt": prompt, "text": text, "tokens": len(ids), "stopped": stopped[i]}
                    sink.write(json.dumps(row, ensure_ascii=False) + "\n")
    finally:
        if sink is not None:
            sink.close()
    if output is not None:
        print(f"{output}: {len(prompts)} answers")


def speaks(ref: CheckpointRef) -> bool:
    """Whether the weights were taught the chat template: by their stage, or by the template that came with them."""
    if not ref.released:
        return ref.stage in CHATS
    settings = ref.path / "tokenizer_config.json"
    has_template = settings.is_file() and "chat_template" in read_json(settings)
    return has_template or (ref.path / "chat_template.jinja").is_file()


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name} is not known: allowed are auto, cpu, cuda, cuda:1 and the like") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name} is asked for, but this machine has no CUDA device")
    return device


def pick_precision(name: str | None, device: torch.device) -> Any:
    """BF16 on a GPU, FP32 on a CPU, unless one was named."""
    if name is None:
        return BF16() if device.type == "cuda" else FP32()
    if name not in _PRECISIONS:
        raise ValueError(f"precision={name} is not known: allowed are {', '.join(_PRECISIONS)}")
    return _PRECISIONS[name]()
