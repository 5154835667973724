"""The MTP module: parity with the released layer as transformers' parts compose it, phases, shapes."""

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from litseek.data.batch import MicroBatch
from litseek.models.mtp import shift_left
from litseek.models.transformer import Transformer
from litseek.precision import BF16
from tests.conformance.slow import model_of
from tests.models.parity import YARN, relative, theirs, tiny_config

CASES = {"plain": {}, "yarn": dict(rope_scaling=YARN), "no q_lora": dict(q_lora_rank=None)}


class TheirMTP(torch.nn.Module):
    """Layer 61 of the released weights: transformers has its parts and skips its forward, so they are composed here."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.main, own = theirs(model), model.mtp[0].state_dict()
        config, width = self.main.config, model.cfg.hidden_size
        self.enorm, self.hnorm, self.norm = (DeepseekV3RMSNorm(width, config.rms_norm_eps) for _ in range(3))
        self.eh_proj = torch.nn.Linear(2 * width, width, bias=False)
        self.block = DeepseekV3DecoderLayer(config, config.num_hidden_layers).eval()
        self.load_state_dict(
            {k: v for k, v in own.items()} | {f"main.{k}": v for k, v in self.main.state_dict().items()}
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits for the token after next at places 0 .. S - 2."""
        hidden = self.main.model(tokens[:, :-1]).last_hidden_state  # after the final norm
        embedded = self.main.model.embed_tokens(tokens[:, 1:])
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        length = x.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        rotary = self.main.model.rotary_emb(x, positions)
        x = self.block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return self.main.lm_head(self.norm(x))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_equal_the_released_layer(changes):
    model = model_of(tiny_config(num_nextn_predict_layers=1, **changes), seed=3)
    other = TheirMTP(model)
    tokens = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    ours = model.head_logits(model(MicroBatch.of(tokens))["mtp.0"])[:, :-1]
    reference = other(tokens)
    assert (ours - reference).abs().max() < 1e-4
    seed = torch.randn_like(reference)
    ours.backward(seed)
    reference.backward(seed)
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("mtp.0."):
            theirs_name = name.removeprefix("mtp.0.")
        else:
            theirs_name = f"main.{name}" if name.startswith("lm_head") else f"main.model.{name}"
        assert relative(parameter.grad, gradients[theirs_name].grad) < 1e-3, name


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_phases_of_every_depth(depths):
    model = model_of(tiny_config(num_nextn_predict_layers=depths))
    names = [phase.name for phase in model.phases()]
    expected = [
        f"mtp.{k}.{part}"
        for k in range(depths)
        for part in ("enter", "attend", "dispatch", "experts", "combine", "leave")
    ]
    assert names[names.index("norm") + 1 :] == expected and len(set(names)) == len(names)
    state = model(MicroBatch.of(torch.randint(0, 97, (2, 5))))
    assert set(state) == {"hidden", "aux", "loads", *(f"mtp.{k}" for k in range(depths))}


def test_shift_left():
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert shift_left(tokens, 1).tolist() == [[6, 7, 0], [9, 10, 0]]
    assert shift_left(tokens, 2).tolist() == [[7, 0, 0], [10, 0, 0]]
    assert shift_left(tokens, 3).tolist() == shift_left(tokens, 4).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 10]]


def test_a_sequence_of_one_token():
    state = model_of(tiny_config(num_nextn_predict_layers=2))(MicroBatch.of(torch.tensor([[3]])))
    assert state["mtp.1"].shape == (1, 1, 48) and torch.isfinite(state["mtp.1"]).all()


def test_isolated_documents_stay_isolated_in_mtp_attention():
    """Inside a document every place but the last k sees the same as when the document stands alone."""
    model = model_of(tiny_config(num_nextn_predict_layers=2)).eval()
    a, b = torch.randint(1, 97, (1, 9)), torch.randint(1, 97, (1, 6))
    packed = MicroBatch.of(torch.cat([a, b], dim=1))
    packed.positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    packed.documents = torch.tensor([[0] * 9 + [1] * 6])
    with torch.no_grad():
        state, first, second = model(packed), model(MicroBatch.of(a)), model(MicroBatch.of(b))
    for k in (1, 2):
        key = f"mtp.{k - 1}"
        assert relative(state[key][:, : 9 - k], first[key][:, : 9 - k]) < 1e-5
        assert relative(state[key][:, 9 : 15 - k], second[key][:, : 6 - k]) < 1e-5


def test_bf16_states_and_fp32_masters():
    model = Transformer(tiny_config(num_nextn_predict_layers=1), BF16())
    state = model(MicroBatch.of(torch.randint(0, 97, (1, 6))))
    assert state["mtp.0"].dtype == torch.bfloat16 and model.mtp[0].eh_proj.weight.dtype == torch.float32
