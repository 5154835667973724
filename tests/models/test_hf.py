"""The released format: names and dtypes, both config dialects, round trips, damage; transformers on the other side."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from litseek_kernels.ref.quantise import quantise_block
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from litseek.errors import LitseekError
from litseek.models.config import DeepSeekV3Config
from litseek.models.hf import Origin, load_pretrained, save_pretrained
from litseek.models.hf_config import config_from_json, config_to_json
from litseek.models.hf_layout import released_layout
from litseek.models.transformer import build

FP8 = torch.float8_e4m3fn
YARN = {
    **{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}


def config(**changes):
    """One dense layer, one mixture, one MTP depth; widths that are no multiples of 128, one above it."""
    shape = dict(
        vocab_size=64,
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
        rope_scaling=YARN,
        initializer_range=0.1,
        num_nextn_predict_layers=1,
    )
    return DeepSeekV3Config(**(shape | changes))


def tiny(**changes):
    model = build(config(**changes), seed=1)
    for i, router in enumerate(model.balance_routers().values()):
        router.e_score_correction_bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    return model


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same_files(left, right):
    one, other = tensors(left), tensors(right)
    assert one.keys() == other.keys()
    assert [n for n in one if not same_bytes(one[n], other[n])] == []


def released_folder(folder, dtype):
    """A folder as the release would have it, with FP8 scales that no quantiser of ours would choose."""
    save_pretrained(tiny(), folder, dtype)
    if dtype == "fp8":
        generator = torch.Generator().manual_seed(9)
        for file in folder.glob("*.safetensors"):
            held = load_file(file)
            for name in [n for n in held if n.endswith("_scale_inv")]:
                held[name] = torch.rand(held[name].shape, generator=generator) * 1e-3
                codes = held[name.removesuffix("_scale_inv")]
                codes.copy_(torch.randn(codes.shape, generator=generator).mul_(3).to(FP8))
            save_file(held, file, {"format": "pt"})
    return folder


NAMES = """
model.embed_tokens.weight 64x40
model.layers.0.input_layernorm.weight 40
model.layers.0.self_attn.q_a_proj.weight 20x40 8
model.layers.0.self_attn.q_a_layernorm.weight 20
model.layers.0.self_attn.q_b_proj.weight 32x20 8
model.layers.0.self_attn.kv_a_proj_with_mqa.weight 24x40 8
model.layers.0.self_attn.kv_a_layernorm.weight 16
model.layers.0.self_attn.kv_b_proj.weight 32x16 8
model.layers.0.self_attn.o_proj.weight 40x16 8
model.layers.0.post_attention_layernorm.weight 40
model.layers.0.mlp.gate_proj.weight 140x40 8
model.layers.0.mlp.up_proj.weight 140x40 8
model.layers.0.mlp.down_proj.weight 40x140 8
model.layers.1.mlp.gate.weight 4x40
model.layers.1.mlp.gate.e_score_correction_bias 4 32
model.layers.1.mlp.experts.3.gate_proj.weight 24x40 8
model.layers.1.mlp.experts.3.up_proj.weight 24x40 8
model.layers.1.mlp.experts.3.down_proj.weight 40x24 8
model.layers.1.mlp.shared_experts.gate_proj.weight 24x40 8
model.layers.1.mlp.shared_experts.down_proj.weight 40x24 8
model.norm.weight 40
lm_head.weight 64x40
model.layers.2.embed_tokens.weight 64x40
model.layers.2.enorm.weight 40
model.layers.2.hnorm.weight 40
model.layers.2.eh_proj.weight 40x80
model.layers.2.self_attn.o_proj.weight 40x16 8
model.layers.2.mlp.gate.e_score_correction_bias 4 32
model.layers.2.mlp.experts.0.up_proj.weight 24x40 8
model.layers.2.shared_head.norm.weight 40
model.layers.2.shared_head.head.weight 64x40
"""
"""Of the release's index: shape, then 8 for FP8, 32 for float32, nothing for BF16."""


def test_fp8_names_shapes_and_dtypes_are_the_releases(tmp_path):
    save_pretrained(tiny(), tmp_path / "m", "fp8")
    found = tensors(tmp_path / "m")
    for line in NAMES.split("\n")[1:-1]:
        name, shape, *kind = line.split()
        assert "x".join(map(str, found[name].shape)) == shape, name
        wanted = {"8": FP8, "32": torch.float32}[kind[0]] if kind else torch.bfloat16
        assert found[name].dtype == wanted, name
        assert (name + "_scale_inv" in found) == (wanted == FP8)
    assert found["model.layers.0.mlp.gate_proj.weight_scale_inv"].shape == (2, 1)
    quantised = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert quantised == {
        **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
        "weight_block_size": [128, 128],
    }


def test_the_671b_layout_is_the_releases():
    """Tensor counts of the published index: 91,991 with scales; 685B parameters with MTP's copies."""
    pieces = list(released_layout(DeepSeekV3Config()))
    assert len({p.name for p in pieces}) == len(pieces)
    assert len(pieces) + sum(p.quantised for p in pieces) == 91_991
    own = sum(torch.Size(p.shape).numel() for p in pieces if not p.copy and "e_score" not in p.name)
    assert own == DeepSeekV3Config().num_params()
    latent = next(p for p in pieces if p.name == "model.layers.61.self_attn.kv_a_proj_with_mqa.weight")
    assert latent.shape == (576, 7168) and latent.scale_shape == (5, 56)
    assert next(p for p in pieces if p.name.endswith("61.eh_proj.weight")).shape == (7168, 14336)


@pytest.mark.parametrize(
    "changes", [{}, {"num_nextn_predict_layers": 0}, {"q_lora_rank": None}, {"n_shared_experts": 2}]
)
def test_float32_is_kept_bit_for_bit_and_logits_are_the_same(tmp_path, changes):
    model = tiny(**changes)
    save_pretrained(model, tmp_path / "m", shard_size=20_000)
    again = load_pretrained(tmp_path / "m")
    assert again.cfg == model.cfg
    state = again.state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 3


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_untrained_weights_go_back_to_the_same_bytes(tmp_path, dtype):
    source = released_folder(tmp_path / "source", dtype)
    save_pretrained(load_pretrained(source), tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_a_trained_block_is_quantised_anew_and_the_others_keep_their_bytes(tmp_path):
    source = released_folder(tmp_path / "source", "fp8")
    model = load_pretrained(source)
    with torch.no_grad():
        model.layers[0].mlp.gate_proj.weight[130, 3] += 1.0
    save_pretrained(model, tmp_path / "back")
    before, after = tensors(source), tensors(tmp_path / "back")
    name = "model.layers.0.mlp.gate_proj.weight"
    changed = {n for n in before if not same_bytes(before[n], after[n])}
    assert changed == {name, name + "_scale_inv"}
    codes, scale = quantise_block(model.layers[0].mlp.gate_proj.weight.detach())
    assert after[name + "_scale_inv"][1, 0] == scale[1, 0] and same_bytes(after[name][128:], codes[128:])
    assert after[name + "_scale_inv"][0, 0] == before[name + "_scale_inv"][0, 0]
    assert same_bytes(after[name][:128], before[name][:128])


def test_fp8_to_bf16_is_the_released_cast(tmp_path):
    source = released_folder(tmp_path / "source", "fp8")
    save_pretrained(load_pretrained(source), tmp_path / "bf16", "bf16")
    before, after = tensors(source), tensors(tmp_path / "bf16")
    for name, codes in before.items():
        if codes.dtype == FP8:
            scale = before[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            wanted = (codes.float() * scale[: codes.shape[0], : codes.shape[1]]).to(torch.bfloat16)
            assert same_bytes(after[name], wanted)
    raw = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in raw and raw["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("groups", [(2, 2), (1, 1)])
@pytest.mark.parametrize("yarn", [YARN, None])
def test_transformers_loads_what_we_write_and_we_load_what_it_writes(tmp_path, groups, yarn):
    model = tiny(n_group=groups[0], topk_group=groups[1], rope_scaling=yarn)
    save_pretrained(model, tmp_path / "ours")
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert (theirs(tokens).logits - model.logits(tokens)).abs().max() < 1e-4
    for key in ("scoring_func", "topk_method", "moe_layer_freq", "seq_aux", "aux_loss_alpha"):
        delattr(theirs.config, key)  # carried over from our file; a config made by transformers has none of them
    theirs.save_pretrained(tmp_path / "theirs")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "rope_parameters" in raw and "rope_scaling" not in raw and "scoring_func" not in raw
    with pytest.warns(UserWarning, match="num_nextn_predict_layers=1, but the folder holds no tensor of layer 2"):
        back = load_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert (back.logits(tokens) - model.logits(tokens)).abs().max() < 1e-5
    # transformers drops MTP when it saves; everything else of ours came through.
    assert back.cfg == model.cfg.replace(num_nextn_predict_layers=0, aux_loss_alpha=back.cfg.aux_loss_alpha)
    save_pretrained(back, tmp_path / "again")
    assert_same_files(tmp_path / "theirs", tmp_path / "again")


def test_groups_are_scored_as_transformers_does_whatever_k_over_m_is(tmp_path):
    """4 of 8 experts over 4 groups: K_r / M is 1, other readers sum 2 (report §2.1.2 against the released code)."""
    own = tiny(n_routed_experts=16, n_group=4, topk_group=4, num_experts_per_tok=4, group_score_experts=2)
    save_pretrained(own, tmp_path / "m")
    assert load_pretrained(tmp_path / "m").cfg.experts_per_group_score == 2
    other = tiny(n_routed_experts=16, n_group=4, topk_group=4, num_experts_per_tok=4)
    with pytest.warns(UserWarning, match="will route differently"):
        save_pretrained(other, tmp_path / "n")
    assert load_pretrained(tmp_path / "n").cfg.experts_per_group_score == 1


def test_the_released_config_json_is_understood(tmp_path):
    raw = config_to_json(config(), "fp8") | {"ep_size": 1, "auto_map": {"AutoConfig": "configuration_deepseek.X"}}
    cfg = config_from_json(raw, tmp_path)
    assert cfg == config()
    assert raw["model_type"] == "deepseek_v3" and raw["architectures"] == ["DeepseekV3ForCausalLM"]
    assert raw["num_key_value_heads"] == 2 and raw["topk_method"] == "noaux_tc" and raw["scoring_func"] == "sigmoid"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "64"),
    ],
)
def test_what_this_code_does_not_compute_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "config.json"
    with pytest.raises(LitseekError, match=message) as error:
        config_from_json(config_to_json(config(), "bf16") | change, path)
    assert str(path) in str(error.value)


def test_yarn_without_both_mscales_moves_the_factor_onto_cos_and_sin(tmp_path):
    plain = {k: v for k, v in YARN.items() if not k.startswith("mscale")}
    model = tiny(num_nextn_predict_layers=0)
    save_pretrained(model, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scaling": plain}))
    tokens = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        ours = load_pretrained(tmp_path / "m").logits(tokens)
        assert (theirs(tokens).logits - ours).abs().max() < 1e-4
        assert (model.logits(tokens) - ours).abs().max() > 1e-2


def break_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def rewrite(folder, change):
    """Change the tensors of the shard that holds the first expert, index left as it was."""
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    held = load_file(file)
    change(held, name)
    save_file(held, file)
    return file.name, name


def test_damage_is_named_by_file_and_tensor(tmp_path):
    def fresh(name):
        folder = tmp_path / name
        save_pretrained(tiny(), folder, "fp8", shard_size=30_000)
        return folder, sorted(folder.glob("*.safetensors"))

    folder, files = fresh("missing shard")
    files[2].unlink()
    with pytest.raises(LitseekError, match=f"{files[2].name} is missing"):
        load_pretrained(folder)

    folder, files = fresh("truncated")
    files[1].write_bytes(files[1].read_bytes()[:-7])
    with pytest.raises(LitseekError, match=f"{files[1].name} is damaged or truncated"):
        load_pretrained(folder)

    folder, _ = fresh("missing tensor")
    file, name = rewrite(folder, lambda held, name: held.pop(name))
    with pytest.raises(LitseekError, match=rf"{file} lacks the tensor {name}"):
        load_pretrained(folder)

    folder, _ = fresh("missing everywhere")
    break_index(folder, lambda weights: weights.pop("model.norm.weight"))
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        held.pop("model.norm.weight", None)
        save_file(held, path)
    with pytest.raises(LitseekError, match=r"lacks the tensor model\.norm\.weight"):
        load_pretrained(folder)

    folder, _ = fresh("wrong shape")
    file, name = rewrite(folder, lambda held, name: held.update({name: torch.zeros(3, 5, dtype=FP8)}))
    with pytest.raises(LitseekError, match=rf"{file}: {name} has shape \[3, 5\].*\[24, 40\]"):
        load_pretrained(folder)

    folder, _ = fresh("unknown tensor")
    file, _ = rewrite(folder, lambda held, name: held.update({"model.layers.1.mlp.router.weight": torch.zeros(1)}))
    with pytest.raises(LitseekError, match=rf"{file} holds the tensor model\.layers\.1\.mlp\.router\.weight"):
        load_pretrained(folder)

    folder, _ = fresh("no config")
    (folder / "config.json").unlink()
    with pytest.raises(LitseekError, match=r"config\.json is missing"):
        load_pretrained(folder)

    with pytest.raises(LitseekError, match="is not a folder"):
        load_pretrained(tmp_path / "nowhere")


def test_fp8_without_its_scales_is_refused(tmp_path):
    save_pretrained(tiny(), tmp_path / "m", "fp8")
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    break_index(tmp_path / "m", lambda weights: weights.pop(scale))
    (file,) = (tmp_path / "m").glob("*.safetensors")
    held = load_file(file)
    held.pop(scale)
    save_file(held, file)
    with pytest.raises(LitseekError, match=r"o_proj\.weight is FP8 but .*_scale_inv is missing"):
        load_pretrained(tmp_path / "m")


def test_copies_that_are_none_are_reported(tmp_path):
    save_pretrained(tiny(), tmp_path / "m")
    (file,) = (tmp_path / "m").glob("*.safetensors")
    held = load_file(file)
    held["model.layers.2.embed_tokens.weight"] += 1
    save_file(held, file)
    with pytest.warns(UserWarning, match=r"layers\.2\.embed_tokens\.weight differs from model\.embed_tokens\.weight"):
        load_pretrained(tmp_path / "m")


def test_a_failed_save_leaves_the_earlier_folder_alone(tmp_path, monkeypatch):
    model = tiny()
    save_pretrained(model, tmp_path / "m")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("litseek.models.hf.write_json", full)
    with pytest.raises(LitseekError, match="m cannot be written: No space left on device"):
        save_pretrained(model, tmp_path / "m", "bf16")
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_saving_again_leaves_no_stale_shards(tmp_path):
    model = tiny()
    save_pretrained(model, tmp_path / "m", shard_size=20_000)
    save_pretrained(model, tmp_path / "m", "bf16")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_pretrained(tmp_path / "m").__dict__["origin"].dtypes["lm_head.weight"] == torch.bfloat16


def test_an_unknown_dtype_is_named(tmp_path):
    with pytest.raises(ValueError, match="dtype=int4"):
        save_pretrained(tiny(), tmp_path / "m", "int4")
    assert Origin().dtypes == {} and list(tmp_path.iterdir()) == []
