"""Our model against transformers' DeepseekV3: logits within 1e-4, gradients within 1e-3 relative, in float32."""

import pytest
import torch

from litseek.models.transformer import Transformer
from tests.models.parity import YARN, relative, theirs, tiny_config, with_biases

CASES = {
    "groups": {},
    "one group": dict(n_group=1, topk_group=1),
    "no q_lora": dict(q_lora_rank=None),
    "yarn": dict(rope_scaling=YARN),
    "yarn, one mscale": dict(rope_scaling={**YARN, "mscale": 0.707}),
    "yarn, factor on cos and sin": dict(rope_scaling={**YARN, "mscale_all_dim": 0.0}),
    "unnormalised gate": dict(norm_topk_prob=False, routed_scaling_factor=1.0),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_and_gradients_equal_transformers(changes):
    model = with_biases(Transformer(tiny_config(**changes), seed=3))
    other = theirs(model)
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    ours, reference = model.logits(tokens), other(tokens).logits
    assert (ours - reference).abs().max() < 1e-4

    labels = tokens.roll(-1, 1).flatten()
    torch.nn.functional.cross_entropy(ours.flatten(0, 1), labels).backward()
    torch.nn.functional.cross_entropy(reference.flatten(0, 1), labels).backward()
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        expected = gradients[name if name.startswith("lm_head") else f"model.{name}"].grad
        assert relative(parameter.grad, expected) < 1e-3, name
