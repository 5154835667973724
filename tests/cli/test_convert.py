"""`litseek convert`: bytes kept through every detour, memory bounded, and the other side reads the result."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from litseek.cli.__main__ import main
from litseek.cli.convert import convert, open_source, parse_size, run
from litseek.data import chat
from litseek.data.tokenizer import train
from litseek.errors import LitseekError
from litseek.models.config import DeepSeekV3Config
from litseek.models.hf import load_pretrained, save_pretrained
from litseek.models.hf_files import ShardReader
from litseek.models.transformer import build
from litseek.parallel import storage
from litseek.parallel.checkpoint import load_model, resolve_checkpoint

FP8 = torch.float8_e4m3fn


def tiny(**changes):
    shape = dict(
        vocab_size=320,
        hidden_size=40,
        intermediate_size=140,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=4,
        n_group=2,
        topk_group=2,
        num_attention_heads=2,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.1,
        num_nextn_predict_layers=1,
    )
    model = build(DeepSeekV3Config(**(shape | changes)), seed=1)
    for i, router in enumerate(model.balance_routers().values()):
        router.e_score_correction_bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    return model


def tokenizer():
    return train(["one two three four five 1 + 2 = 3\n"] * 50, 300)


def checkpoint(folder, model, stage="sft"):
    """A checkpoint as a stage of a run writes it."""
    path = folder / stage / "checkpoints" / "step-00000002"
    state = {"state_dict": model.state_dict(), "global_step": 2, "optimizer": {"exp_avg": torch.zeros(3)}}
    storage.save(path, state, model.cfg.to_dict(), tokenizer().raw.to_str())
    (folder / stage / "receipt.json").write_text("{}")
    return path


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_files(left, right):
    one, other = tensors(left), tensors(right)
    assert one.keys() == other.keys()
    for name, a in one.items():
        b = other[name]
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def released(folder, dtype):
    """A released-format folder with FP8 scales that no quantiser of ours would choose."""
    save_pretrained(tiny(), folder, dtype, shard_size=40_000)
    generator = torch.Generator().manual_seed(9)
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        for name in [n for n in held if n.endswith("_scale_inv")]:
            held[name] = torch.rand(held[name].shape, generator=generator) * 1e-3
        save_file(held, file, {"format": "pt"})
    tokenizer().save(folder)
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_round_trip_keeps_every_byte_whatever_the_shards(tmp_path, dtype):
    source = released(tmp_path / "source", dtype)
    text = convert(str(source), str(tmp_path / "target"), shard_size=25_000)
    assert_same_files(source, tmp_path / "target")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "target" / name).read_text() == (source / name).read_text()
    assert len(list((tmp_path / "target").glob("*.safetensors"))) > len(list(source.glob("*.safetensors")))
    assert "target: " in text and "parameters" in text


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_round_trip_through_our_checkpoint_keeps_every_byte(tmp_path, dtype):
    source = released(tmp_path / "source", dtype)
    convert(str(source), str(tmp_path / "ours"), format="checkpoint")
    convert(str(tmp_path / "ours"), str(tmp_path / "target"))
    assert_same_files(source, tmp_path / "target")
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    tokens = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_model(resolve_checkpoint(tmp_path / "ours")).logits(tokens)
        assert torch.equal(ours, load_pretrained(source).logits(tokens))


def test_fp8_to_bf16_is_the_released_cast(tmp_path):
    source = released(tmp_path / "source", "fp8")
    convert(str(source), str(tmp_path / "bf16"), dtype="bf16")
    before, after = tensors(source), tensors(tmp_path / "bf16")
    assert after.keys() == {name for name in before if not name.endswith("_scale_inv")}
    for name, codes in before.items():
        if codes.dtype == FP8:
            scale = before[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            wanted = (codes.float() * scale[: codes.shape[0], : codes.shape[1]]).to(torch.bfloat16)
            assert torch.equal(after[name], wanted)


def test_a_stage_becomes_a_folder_that_transformers_reads(tmp_path):
    model = tiny()
    checkpoint(tmp_path / "run", model)
    convert(str(tmp_path / "run"), str(tmp_path / "export"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    tokens = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert theirs.dtype == torch.float32
        assert (theirs(tokens).logits - model.logits(tokens)).abs().max() < 1e-4
    again = load_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())


def test_the_exported_tokenizer_speaks_the_same_template(tmp_path):
    checkpoint(tmp_path / "run", tiny())
    convert(str(tmp_path / "run"), str(tmp_path / "export"))
    own, other = tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "export")
    messages = [
        {"role": "system", "content": "two"},
        {"role": "user", "content": "1 + 2"},
        {"role": "assistant", "content": "three"},
        {"role": "system", "content": "four"},
        {"role": "user", "content": "five"},
    ]
    ids = other.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == chat.encode_prompt(messages, own)
    raw = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (own.bos_id, own.eos_id)


def test_a_base_model_is_exported_without_a_template(tmp_path):
    checkpoint(tmp_path / "run", tiny(), stage="pretrain")
    convert(str(tmp_path / "run"), str(tmp_path / "export"))
    assert "chat_template" not in json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())


def test_memory_stays_within_two_shards(tmp_path, monkeypatch):
    """Live bytes of everything that was read, counted at each tensor's birth and death."""
    source, limit = released(tmp_path / "source", "fp8"), 40_000
    convert(str(source), str(tmp_path / "ours"), format="checkpoint", shard_size=limit)
    live, peak, read = 0, 0, ShardReader.read

    def forget(size):
        nonlocal live
        live -= size

    def counted(self, name, index=None):
        nonlocal live, peak
        tensor = read(self, name, index).clone()
        live += tensor.nbytes
        peak = max(peak, live)
        weakref.finalize(tensor, forget, tensor.nbytes)
        return tensor

    monkeypatch.setattr(ShardReader, "read", counted)
    for start in (source, tmp_path / "ours"):
        for dtype in ("bf16", "fp8"):
            convert(str(start), str(tmp_path / f"{start.name}-{dtype}"), dtype=dtype, shard_size=limit)
    convert(str(source), str(tmp_path / "again"), format="checkpoint", shard_size=limit)
    assert sum(file.stat().st_size for file in source.glob("*.safetensors")) > 3 * limit
    assert 0 < peak <= 2 * limit


def test_only_whole_targets_appear_and_taken_ones_are_refused(tmp_path, monkeypatch):
    source = released(tmp_path / "source", "bf16")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    for format in ("released", "checkpoint"):
        with pytest.raises(LitseekError, match="taken exists already"):
            convert(str(source), str(tmp_path / "taken"), format=format)
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("litseek.models.hf_files.write_shard", full)
    for format in ("released", "checkpoint"):
        with pytest.raises(LitseekError, match="No space left on device"):
            convert(str(source), str(tmp_path / "target"), format=format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "taken"]


def test_damage_is_found_before_anything_is_written(tmp_path):
    source = released(tmp_path / "source", "fp8")
    file = sorted(source.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(LitseekError, match=f"{file.name} is damaged or truncated"):
        convert(str(source), str(tmp_path / "target"))
    for path in source.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(LitseekError, match=r"the shard .* is missing"):
        convert(str(source), str(tmp_path / "target"))
    path = checkpoint(tmp_path / "run", tiny())
    (path / "state.json").write_text("{")
    with pytest.raises(LitseekError, match=r"state\.json"):
        convert(str(tmp_path / "run"), str(tmp_path / "target"))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype=int8"),
        ({"format": "gguf"}, "format=gguf"),
        ({"format": "checkpoint", "dtype": "fp8"}, "dtype=fp8 does not go with format=checkpoint"),
        ({"shard_size": "5 parsecs"}, "shard_size=5 parsecs"),
    ],
)
def test_settings_are_checked_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert("nowhere", str(tmp_path / "t"), **options)


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "1.5 MiB", 12, "12")] == [5 * 10**9, 3 * 2**19, 12, 12]


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(LitseekError, match="nowhere"):
        open_source(tmp_path / "nowhere")


def test_the_command_takes_its_configuration(tmp_path, capsys):
    source = released(tmp_path / "source", "bf16")
    values = dict(format="released", dtype="keep", shard_size="5GB", debug=False)
    run(OmegaConf.create(dict(source=str(source), target=str(tmp_path / "t"), **values)))
    assert "t: " in capsys.readouterr().out and (tmp_path / "t" / "config.json").is_file()


def test_the_command_line_converts_and_says_what_is_wrong(tmp_path, capsys):
    source = released(tmp_path / "source", "fp8")
    assert main(["convert", f"source={source}", f"target={tmp_path / 't'}", "dtype=bf16", "shard_size=50KB"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main(["convert", f"source={source}", f"target={tmp_path / 't'}"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "t exists already" in err


def test_what_transformers_dropped_is_said_in_one_line(tmp_path, capsys):
    model = tiny(num_nextn_predict_layers=0)
    save_pretrained(model, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))
    assert main(["convert", f"source={tmp_path / 'theirs'}", f"target={tmp_path / 't'}"]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("litseek: ") and "loaded without MTP" in err
    assert json.loads((tmp_path / "t" / "config.json").read_text())["num_nextn_predict_layers"] == 0
