"""`litseek generate`: what reaches the model, what reaches the terminal and the file, and what is refused."""

from __future__ import annotations

import io
import json

import pytest
import torch
from omegaconf import OmegaConf

from litseek.cli.__main__ import main
from litseek.cli.generate import Speaker, pick_device, pick_precision, read_prompts, run, speaks
from litseek.data import chat
from litseek.data.tokenizer import train
from litseek.errors import LitseekError
from litseek.inference.engine import Engine, Sampling
from litseek.models.config import DeepSeekV3Config
from litseek.models.hf import save_pretrained
from litseek.models.transformer import build
from litseek.parallel import storage
from litseek.parallel.checkpoint import resolve_checkpoint

DEFAULTS = dict(
    **dict(prompt=None, input_file=None, output_file=None, chat=None, system=None, temperature=0.0, top_p=1.0),
    **dict(max_tokens=8, stream=True, absorbed=True, precision=None, device="cpu", batch=3, seed=0, debug=False),
)


@pytest.fixture(scope="module")
def tokenizer():
    return train(["one two three four five 1 + 2 = 3 née 你好\n"] * 50, 300)


@pytest.fixture(scope="module")
def model():
    cfg = DeepSeekV3Config(
        **dict(vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2),
        **dict(first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1),
        **dict(num_attention_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8),
        **dict(v_head_dim=8, max_position_embeddings=40, initializer_range=0.2, num_nextn_predict_layers=0),
    )
    return build(cfg, seed=1)


@pytest.fixture
def stage(tmp_path, model, tokenizer):
    def write(name):
        path = tmp_path / "run" / name / "checkpoints" / "step-00000001"
        storage.save(path, {"state_dict": model.state_dict()}, model.cfg.to_dict(), tokenizer.raw.to_str())
        (tmp_path / "run" / name / "receipt.json").write_text("{}")
        return str(tmp_path / "run")

    return write


def generate(checkpoint, **options):
    run(OmegaConf.create({"checkpoint": checkpoint, **DEFAULTS, **options}))


def wanted(model, tokenizer, ids, turn=0, **sampling):
    stop = (tokenizer.eos_id, tokenizer.user_id) if tokenizer.user_id in ids else (tokenizer.eos_id,)
    how = Sampling(**({"max_tokens": 8, "temperature": 0.0} | sampling), stop=stop)
    return tokenizer.decode(Engine(model).generate([ids], how, first=turn).lists()[0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_base_model_continues_the_text(stage, model, tokenizer, capsys, stream):
    generate(stage("pretrain"), prompt="one two", stream=stream)
    text = wanted(model, tokenizer, [tokenizer.bos_id, *tokenizer.encode("one two")])
    assert capsys.readouterr().out == text + "\n" and text


def test_a_tuned_model_is_asked_through_the_template(stage, model, tokenizer, capsys):
    folder = stage("sft")
    generate(folder, prompt="1 + 2 =", temperature=1.0, seed=4)
    ids = chat.encode_prompt([{"role": "user", "content": "1 + 2 ="}], tokenizer)
    assert capsys.readouterr().out == wanted(model, tokenizer, ids, temperature=1.0, seed=4) + "\n"
    generate(folder, prompt="1 + 2 =", chat=False)
    plain = [tokenizer.bos_id, *tokenizer.encode("1 + 2 =")]
    assert capsys.readouterr().out == wanted(model, tokenizer, plain) + "\n"


def test_a_run_folder_speaks_with_its_last_finished_stage(stage):
    stage("pretrain")
    folder = stage("grpo")
    assert speaks(resolve_checkpoint(folder)) and not speaks(resolve_checkpoint(f"{folder}/pretrain"))


def test_a_released_folder_chats_if_it_brought_a_template(tmp_path, model, tokenizer, capsys):
    save_pretrained(model, tmp_path / "m")
    with pytest.raises(LitseekError, match=r"has no tokenizer\.json"):
        generate(str(tmp_path / "m"), prompt="one")
    tokenizer.save(tmp_path / "m")
    generate(str(tmp_path / "m"), prompt="one")
    assert capsys.readouterr().out == wanted(model, tokenizer, [tokenizer.bos_id, *tokenizer.encode("one")]) + "\n"
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    assert speaks(resolve_checkpoint(tmp_path / "m"))


def test_a_file_of_prompts_is_answered_in_order_whatever_the_batch(stage, tmp_path, model, tokenizer, capsys):
    folder = stage("sft")
    lines = ["one", "", "two three", "1 + 2", "four five one two", "née"]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    how = dict(input_file=str(tmp_path / "in.txt"), temperature=1.0, seed=3)
    generate(folder, output_file=str(tmp_path / "out.jsonl"), **how)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    assert [row["prompt"] for row in rows] == prompts
    for i, row in enumerate(rows):
        ids = chat.encode_prompt([{"role": "user", "content": row["prompt"]}], tokenizer)
        assert row["text"] == wanted(model, tokenizer, ids, turn=i, temperature=1.0, seed=3)
        assert row["tokens"] == 8 or row["stopped"]
    assert "5 answers" in capsys.readouterr().out
    generate(folder, batch=64, **how)
    assert capsys.readouterr().out == "".join(f"> {row['prompt']}\n{row['text']}\n" for row in rows)


def test_a_conversation_remembers_and_ends_with_exit(stage, model, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/new\nthree\n/exit\nnever\n"))
    generate(stage("sft"), max_tokens=4)
    messages, answers = [], []
    for turn, line in enumerate(["one", "two"]):
        messages.append({"role": "user", "content": line})
        answers.append(wanted(model, tokenizer, chat.encode_prompt(messages, tokenizer), turn, max_tokens=4))
        messages.append({"role": "assistant", "content": answers[-1]})
    fresh = chat.encode_prompt([{"role": "user", "content": "three"}], tokenizer)
    answers.append(wanted(model, tokenizer, fresh, 2, max_tokens=4))
    assert capsys.readouterr().out.split("\n", 1)[1] == "".join(answer + "\n" for answer in answers)


def test_a_conversation_forgets_its_oldest_turns_when_the_range_is_full(stage, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one two three four five\n" * 6 + "one " * 60 + "\nfive\n"))
    generate(stage("sft"), max_tokens=4)
    out, err = capsys.readouterr()
    assert "oldest turns forgotten: the model sees 40 tokens" in err
    assert "allows at most 39" in err and len(out.strip().split("\n")) >= 2


def test_pieces_are_whole_characters(model, tokenizer):
    speaker = Speaker(Engine(model), tokenizer, False, None, Sampling())
    ids = tokenizer.encode("你好, née")
    speaker.engine.stream = lambda *_, **__: iter(ids)
    pieces = list(speaker.answer([1]))
    assert "".join(pieces) == "你好, née" and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt="a", input_file="b"), "prompt and input_file"),
        (dict(output_file="b"), "output_file"),
        (dict(prompt="a", temperature=-1.0), "temperature=-1.0"),
        (dict(prompt="a", top_p=0.0), "top_p"),
        (dict(prompt="a", max_tokens=0), "max_tokens=0"),
        (dict(prompt="a", precision="int4"), "precision=int4"),
        (dict(prompt="a", device="abacus"), "device=abacus"),
        (dict(prompt="a", system="be brief"), "system=be brief needs the chat template"),
        (dict(input_file="IN", batch=0), "batch=0"),
    ],
)
def test_impossible_settings_are_named(stage, tmp_path, options, message):
    (tmp_path / "in.txt").write_text("one\n")
    options = {k: str(tmp_path / "in.txt") if v == "IN" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        generate(stage("pretrain"), **options)


def test_what_is_missing_is_named(stage, tmp_path, tokenizer):
    with pytest.raises(LitseekError, match="nowhere"):
        generate(str(tmp_path / "nowhere"), prompt="a")
    with pytest.raises(LitseekError, match=r"input_file=.*absent\.txt does not exist"):
        generate(stage("pretrain"), input_file=str(tmp_path / "absent.txt"))
    with pytest.raises(LitseekError, match=r"prompt 1 has \d+ tokens, and the model's range of 40 positions"):
        generate(stage("pretrain"), prompt="one " * 100)
    (tmp_path / "in.txt").write_text("one\n" + "two " * 100)
    with pytest.raises(LitseekError, match="line 2 of the prompts has"):
        generate(stage("pretrain"), input_file=str(tmp_path / "in.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(LitseekError, match="has no prompt"):
        read_prompts(tmp_path / "empty.txt")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, model):
    big = train([f"{i:x} {i * 7919:x}" for i in range(3000)], 700)
    path = tmp_path / "pretrain" / "checkpoints" / "step-1"
    storage.save(path, {"state_dict": model.state_dict()}, model.cfg.to_dict(), big.raw.to_str())
    with pytest.raises(ValueError, match=r"tokens, more than model\.vocab_size=320"):
        generate(str(path), prompt="a")


def test_precision_follows_the_device():
    assert pick_precision(None, torch.device("cpu")).name == "fp32"
    assert pick_precision(None, torch.device("cuda")).name == "bf16"
    assert pick_precision("bf16", torch.device("cpu")).name == "bf16"
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("prompt", ["3 + 4 =", "Hello, world", "a=${b} 'c' [d]"])
def test_a_prompt_reaches_the_model_as_typed(stage, model, tokenizer, capsys, prompt):
    status = main(["generate", f"checkpoint={stage('pretrain')}", f"prompt={prompt}", "max_tokens=6", "device=cpu"])
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    assert status == 0 and capsys.readouterr().out == wanted(model, tokenizer, ids, max_tokens=6) + "\n"


def test_a_mistake_is_one_sentence_on_stderr(tmp_path, capsys):
    assert main(["generate", f"checkpoint={tmp_path / 'nowhere'}", "prompt=a"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "nowhere" in err and "Traceback" not in err
