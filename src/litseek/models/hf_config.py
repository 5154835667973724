"""config.json of the released layout, in both dialects: the release's own and that of transformers 5."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from litseek.errors import LitseekError
from litseek.models.config import DeepSeekV3Config

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""``quantization_config`` of the released FP8 weights."""
_TRAINING = ("aux_loss_reduction", "mtp_aux_loss")
"""Settings that only training reads and no other program knows: they stay out of config.json."""
RELEASED_GROUP_SCORE = 2
"""How many experts make a group's score in the released code and in every reader, whatever K_r / M is."""
_ABSENT = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "seq_aux": True}
"""What transformers 5 leaves out because it knows no other value."""
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. LitseekError where the file is missing, damaged or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LitseekError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LitseekError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise LitseekError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(value, dict):
        raise LitseekError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config_from_json(raw: dict[str, Any], path: Path) -> DeepSeekV3Config:
    """Our config from config.json's keys; keys that do not shape the model are passed over.

    LitseekError where the model is another architecture, or has a value that this code does not compute.
    """
    kind = raw.get("model_type")
    if kind != "deepseek_v3":
        raise LitseekError(f"{path}: model_type is {kind!r}, allowed is 'deepseek_v3'")
    _check_quantization(raw, path)
    values = {**_ABSENT, **raw}
    values["rope_theta"], values["rope_scaling"] = _rope(raw, path)
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = values["eos_token_id"][0]
    values.setdefault("num_nextn_predict_layers", 0)
    if not values.get("group_score_experts"):
        values["group_score_experts"] = _group_score(values)
    known = {k: v for k, v in values.items() if k in DeepSeekV3Config.field_names() and k not in _TRAINING}
    for name in ("bos_token_id", "eos_token_id"):
        if known.get(name, 0) is None:
            del known[name]
    if known.get("num_key_value_heads") == known.get("num_attention_heads"):
        known.pop("num_key_value_heads", None)  # ours is None for the same thing
    needed = [k for k in _SHAPE if k not in known]
    if needed:
        raise LitseekError(f"{path} lacks {needed[0]}")
    try:
        return DeepSeekV3Config(**known)
    except (ValueError, TypeError) as error:
        raise LitseekError(f"{path}: {error}") from None


def config_to_json(cfg: DeepSeekV3Config, dtype: str) -> dict[str, Any]:
    """The released dialect, with what transformers and the servers need beside it. ``dtype``: fp32, bf16 or fp8.

    Warns where other readers would choose other experts: they score a group by its best 2.
    """
    raw = {k: v for k, v in cfg.to_dict().items() if k not in _TRAINING}
    del raw["group_score_experts"]
    if cfg.n_group > 1 and cfg.experts_per_group_score != RELEASED_GROUP_SCORE:
        raw["group_score_experts"] = cfg.experts_per_group_score
        warnings.warn(
            f"this model scores a group by its best {cfg.experts_per_group_score} experts; transformers, vLLM and SGLang "
            f"take {RELEASED_GROUP_SCORE} and will route differently (model.group_score_experts=2 trains what they run)",
            stacklevel=3,
        )
    raw |= {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": cfg.num_attention_heads,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    return dict(sorted(with_dtype(raw, dtype).items()))


def with_dtype(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same config.json for files of another dtype."""
    out = {k: v for k, v in raw.items() if k != "quantization_config"}
    # transformers 5 names the key "dtype", everyone else "torch_dtype".
    out["dtype" if "dtype" in raw else "torch_dtype"] = _DTYPE_NAMES[dtype]
    if dtype == "fp8":
        out["quantization_config"] = raw.get("quantization_config") or QUANTIZATION
    return out


def _group_score(raw: dict[str, Any]) -> int | None:
    """2 where the report's K_r / M would be another number, so that logits are those of the other readers."""
    try:
        groups, per_group = raw["n_group"], raw["n_routed_experts"] // raw["n_group"]
        by_report = max(1, raw["num_experts_per_tok"] // raw["topk_group"])
    except (KeyError, TypeError, ZeroDivisionError):
        return None  # the config's own checks name what is wrong
    released = min(RELEASED_GROUP_SCORE, per_group)
    return None if groups == 1 or min(by_report, per_group) == released else released


def _check_quantization(raw: dict[str, Any], path: Path) -> None:
    quant = raw.get("quantization_config")
    if quant is None:
        return
    found = (quant.get("quant_method"), quant.get("fmt", "e4m3"), list(quant.get("weight_block_size") or []))
    if found != ("fp8", "e4m3", [128, 128]):
        raise LitseekError(
            f"{path}: quantization_config has quant_method, fmt and weight_block_size {found}, "
            "allowed is ('fp8', 'e4m3', [128, 128])"
        )


def _rope(raw: dict[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling from either dialect."""
    parameters = raw.get("rope_parameters")
    scaling = dict(parameters if parameters is not None else raw.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kind = scaling.pop("rope_type", None) or scaling.get("type")
    scaling.pop("type", None)
    if not scaling and kind in (None, "default"):
        return theta, None
    if kind in (None, "default"):
        raise LitseekError(
            f"{path}: rope type is {kind!r} beside the keys {', '.join(sorted(scaling))}, wanted is 'yarn'"
        )
    if kind != "yarn":
        raise LitseekError(f"{path}: rope type is {kind!r}, allowed are 'yarn' and none")
    if not scaling.get("mscale_all_dim"):
        # transformers then moves the whole factor from the softmax onto cos and sin.
        scaling |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    elif not scaling.get("mscale"):
        raise LitseekError(f"{path}: YaRN has mscale_all_dim {scaling['mscale_all_dim']} but no mscale")
    scaling.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    for ignored in ("attention_factor", "truncate"):
        if scaling.get(ignored) not in (None, True):
            raise LitseekError(f"{path}: YaRN's {ignored} is {scaling[ignored]}, allowed is to leave it out")
        scaling.pop(ignored, None)
    return theta, {"type": "yarn", **scaling}


_SHAPE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "first_k_dense_replace", "intermediate_size"),
    *("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "num_attention_heads", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
)
"""Without these a default would silently be the 671B model's."""
