"""The chat template as token ids (report §5.1): what the release writes between turns, and which tokens are scored.

``BOS system <｜User｜> question <｜Assistant｜> answer EOS <｜User｜> …``: system messages come first, joined by a blank
line. Control tokens are put in by id, so that a message which spells one out stays plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from litseek.data.tokenizer import Tokenizer
from litseek.errors import LitseekError

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")


class Encoded(NamedTuple):
    """Ids of a conversation, and for each whether the assistant wrote it (an answer's text and its EOS)."""

    ids: list[int]
    answer: list[bool]


def encode(messages: Sequence[Message], tokenizer: Tokenizer) -> Encoded:
    """A whole conversation; the answers are what the loss counts."""
    check(messages)
    ids, answer = _head(messages, tokenizer)
    for message in messages:
        if message["role"] == "user":
            new, scored = [tokenizer.user_id, *tokenizer.encode(message["content"])], 0
        elif message["role"] == "assistant":
            text = [*tokenizer.encode(message["content"]), tokenizer.eos_id]
            new, scored = [tokenizer.assistant_id, *text], len(text)
        else:
            continue
        ids += new
        answer += [False] * (len(new) - scored) + [True] * scored
    return Encoded(ids, answer)


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids up to where the assistant begins to write: the conversation so far and ``<｜Assistant｜>``."""
    return [*encode(messages, tokenizer).ids, tokenizer.assistant_id]


def answers(messages: Sequence[Message]) -> str:
    """All that the assistant says, for counting bytes."""
    return "".join(m["content"] for m in messages if m["role"] == "assistant")


def check(messages: Sequence[Message], place: str = "conversation") -> None:
    """Refuses what the template cannot express, naming the place."""
    if not messages:
        raise LitseekError(f"{place}: a conversation without messages.")
    for n, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise LitseekError(f"{place}: message {n} has role {role!r}; known are {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise LitseekError(f"{place}: message {n} has no text in 'content', but {type(content).__name__}.")


def from_row(row: Mapping[str, Any], place: str) -> list[dict[str, str]]:
    """The messages of one data row, in any of the usual layouts.

    ``messages`` (role, content), ``conversations`` (from, value), ``prompt`` and ``response``, or ``instruction``,
    ``input`` and ``output``.
    """
    if isinstance(row.get("messages"), list):
        messages = [{"role": m.get("role"), "content": m.get("content")} for m in row["messages"]]
    elif isinstance(row.get("conversations"), list):
        names = {"human": "user", "gpt": "assistant"}
        messages = [
            {"role": names.get(m.get("from"), m.get("from")), "content": m.get("value")} for m in row["conversations"]
        ]
    elif "prompt" in row and "response" in row:
        messages = _pair(row["prompt"], row["response"])
    elif "instruction" in row and "output" in row:
        messages = _pair("\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"])
    else:
        raise LitseekError(
            f"{place}: no conversation; it needs 'messages', 'conversations', 'prompt' with 'response', or "
            f"'instruction' with 'output', and has {', '.join(sorted(row))}."
        )
    check(messages, place)
    return messages


def _pair(question: Any, answer: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _head(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    ids = [tokenizer.bos_id, *(tokenizer.encode(system) if system else [])]
    return ids, [False] * len(ids)
