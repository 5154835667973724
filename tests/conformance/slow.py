"""The report's formulas in float64, one token, head and expert at a time: the oracle of the conformance tests.

Nothing here calls the code under test. Weights are looked up by their global names, vectors are 1-D tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import Transformer

SHAPE = dict(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
    intermediate_size=20, moe_intermediate_size=6, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=4,
    n_group=4, topk_group=2, routed_scaling_factor=2.5, num_attention_heads=3, q_lora_rank=10, kv_lora_rank=7,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, max_position_embeddings=640, initializer_range=0.3,
    aux_loss_alpha=0.0,
)  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def tiny(**changes) -> DeepSeekV3Config:
    return DeepSeekV3Config(**{**SHAPE, **changes})


def model_of(cfg: DeepSeekV3Config, seed: int = 0, bias_size: float = 0.3, **kwargs) -> Transformer:
    """A model whose norms are not 1 and whose balance biases are not 0: either would hide a mistake."""
    model = Transformer(cfg, seed=seed, **kwargs)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        generator = torch.Generator().manual_seed(seed + 2)
        for router in model.balance_routers().values():
            bias = router.e_score_correction_bias
            bias.copy_(bias_size * torch.randn(bias.shape, generator=generator))
    return model


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).sum() / len(x) + eps)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def frequencies(cfg: DeepSeekV3Config) -> list[float]:
    """Radians a position of each rotary pair. YaRN's bounds are found by counting turns in the original length."""
    dim = cfg.qk_rope_head_dim
    plain = [cfg.rope_theta ** (-2 * i / dim) for i in range(dim)]
    scaling = cfg.rope_scaling
    if scaling is None:
        return plain[: dim // 2]
    turns = [scaling["original_max_position_embeddings"] * f / (2 * math.pi) for f in plain]
    low = max([i for i in range(dim) if turns[i] >= scaling["beta_fast"]], default=0)
    high = min([i for i in range(dim) if turns[i] <= scaling["beta_slow"]], default=dim - 1)
    mixed = []
    for i in range(dim // 2):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        mixed.append(interpolated * plain[i] / scaling["factor"] + (1 - interpolated) * plain[i])
    return mixed


def rope(x: Tensor, position: int, freq: list[float]) -> Tensor:
    """Interleaved pairs, as in the released weights."""
    out = []
    for j, f in enumerate(freq):
        cos, sin = math.cos(position * f), math.sin(position * f)
        a, b = x[2 * j], x[2 * j + 1]
        out += [a * cos - b * sin, a * sin + b * cos]
    return torch.stack(out)


class Slow:
    """The model of ``model``'s weights, in float64 leaves of its own so that gradients can be compared too."""

    def __init__(self, model: Transformer):
        self.cfg = model.cfg
        self.w = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
        self.bias = {n: b.double() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
        self.freq = frequencies(self.cfg)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rms(x, self.w[f"{name}.weight"], self.cfg.rms_norm_eps)

    def latent(self, name: str, h: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Equations 1 and 3: normed c_kv and the rotated key of all heads. All that a cache needs."""
        rank = self.cfg.kv_lora_rank
        down = self.w[f"{name}.kv_a_proj_with_mqa.weight"]
        c_kv = self.norm(f"{name}.kv_a_layernorm", down[:rank] @ h)
        return c_kv, rope(down[rank:] @ h, position, self.freq)

    def query(self, name: str, h: Tensor, position: int, head: int) -> tuple[Tensor, Tensor]:
        """Equations 6 to 9 for one head: unrotated and rotated part."""
        cfg, nope = self.cfg, self.cfg.qk_nope_head_dim
        if cfg.q_lora_rank is None:
            source, up = h, self.w[f"{name}.q_proj.weight"]
        else:
            source = self.norm(f"{name}.q_a_layernorm", self.w[f"{name}.q_a_proj.weight"] @ h)
            up = self.w[f"{name}.q_b_proj.weight"]
        width = nope + cfg.qk_rope_head_dim
        mine = up[head * width : (head + 1) * width]
        return mine[:nope] @ source, rope(mine[nope:] @ source, position, self.freq)

    def key_value(self, name: str, c_kv: Tensor, head: int) -> tuple[Tensor, Tensor]:
        """Equations 2 and 5 for one head."""
        nope, width = self.cfg.qk_nope_head_dim, self.cfg.qk_nope_head_dim + self.cfg.v_head_dim
        mine = self.w[f"{name}.kv_b_proj.weight"][head * width : (head + 1) * width]
        return mine[:nope] @ c_kv, mine[nope:] @ c_kv

    def scale(self) -> float:
        scale = 1 / math.sqrt(self.cfg.qk_nope_head_dim + self.cfg.qk_rope_head_dim)
        if self.cfg.rope_scaling:
            scale *= yarn_mscale(self.cfg.rope_scaling["factor"], self.cfg.rope_scaling["mscale_all_dim"]) ** 2
        return scale

    def attention(self, name: str, hs: list[Tensor], positions: list[int], documents: list[int]) -> list[Tensor]:
        """Equations 10 and 11 over one sequence of normed states."""
        cfg = self.cfg
        latents = [self.latent(name, h, p) for h, p in zip(hs, positions)]
        outs = []
        for t, h in enumerate(hs):
            heads = []
            for i in range(cfg.num_attention_heads):
                q_nope, q_rope = self.query(name, h, positions[t], i)
                seen = [j for j in range(t + 1) if documents[j] == documents[t]]
                keys = [self.key_value(name, latents[j][0], i) for j in seen]
                score = [(q_nope @ k + q_rope @ latents[j][1]) * self.scale() for j, (k, _) in zip(seen, keys)]
                weight = torch.softmax(torch.stack(score), 0)
                heads.append(sum(p * v for p, (_, v) in zip(weight, keys)))
            outs.append(self.w[f"{name}.o_proj.weight"] @ torch.cat(heads))
        return outs

    def scores(self, name: str, u: Tensor) -> list[Tensor]:
        """s_i = sigmoid(u . e_i)."""
        return [1 / (1 + torch.exp(-(u @ e))) for e in self.w[f"{name}.gate.weight"]]

    def choice(self, name: str, score: list[float]) -> list[int]:
        """The chosen experts, by biased scores inside the best groups."""
        cfg = self.cfg
        biased = [s + b for s, b in zip(score, self.bias[f"{name}.gate.e_score_correction_bias"].tolist())]
        size = cfg.n_routed_experts // cfg.n_group
        best = cfg.group_score_experts or cfg.num_experts_per_tok // cfg.topk_group
        groups = []
        for g in range(cfg.n_group):
            highest = sorted(biased[g * size : (g + 1) * size], reverse=True)
            groups.append((sum(highest[:best]), g))
        kept = {g for _, g in sorted(groups, reverse=True)[: cfg.topk_group]}
        allowed = [i for i in range(cfg.n_routed_experts) if i // size in kept]
        return sorted(allowed, key=lambda i: -biased[i])[: cfg.num_experts_per_tok]

    def expert(self, gate: Tensor, up: Tensor, down: Tensor, u: Tensor) -> Tensor:
        return down @ (silu(gate @ u) * (up @ u))

    def swiglu(self, name: str, u: Tensor) -> Tensor:
        return self.expert(*(self.w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")), u)

    def gate(self, name: str, u: Tensor) -> dict[int, Tensor]:
        """Chosen expert -> its weight, from the unbiased scores."""
        score = self.scores(name, u)
        chosen = self.choice(name, [s.item() for s in score])
        total = sum(score[i] for i in chosen) + 1e-20
        return {i: self.cfg.routed_scaling_factor * score[i] / total for i in chosen}

    def moe(self, name: str, u: Tensor) -> Tensor:
        hidden = self.cfg.moe_intermediate_size
        out = self.swiglu(f"{name}.shared_experts", u) if self.cfg.n_shared_experts else torch.zeros_like(u)
        for i, weight in self.gate(name, u).items():
            both = self.w[f"{name}.experts.gate_up_proj"][i]
            out = out + weight * self.expert(both[:hidden], both[hidden:], self.w[f"{name}.experts.down_proj"][i], u)
        return out

    def block(self, name: str, xs: list[Tensor], positions: list[int], documents: list[int]) -> list[Tensor]:
        normed = [self.norm(f"{name}.input_layernorm", x) for x in xs]
        attended = self.attention(f"{name}.self_attn", normed, positions, documents)
        xs = [x + a for x, a in zip(xs, attended)]
        us = [self.norm(f"{name}.post_attention_layernorm", x) for x in xs]
        feed = self.swiglu if f"{name}.mlp.gate_proj.weight" in self.w else self.moe
        return [x + feed(f"{name}.mlp", u) for x, u in zip(xs, us)]

    def hidden(self, tokens: list[int], positions: list[int] | None = None, documents: list[int] | None = None):
        """States after the main final norm."""
        positions = positions or list(range(len(tokens)))
        documents = documents or [0] * len(tokens)
        xs = [self.w["embed_tokens.weight"][t] for t in tokens]
        for layer in range(self.cfg.num_hidden_layers):
            xs = self.block(f"layers.{layer}", xs, positions, documents)
        return [self.norm("norm", x) for x in xs]

    def mtp(self, tokens: list[int], hs: list[Tensor]) -> list[list[Tensor]]:
        """Equations 21 and 22: depth k has len(tokens) - k states, after its own final norm."""
        depths = []
        for k in range(1, self.cfg.num_nextn_predict_layers + 1):
            name, xs = f"mtp.{k - 1}", []
            for i in range(len(tokens) - k):
                embedded = self.norm(f"{name}.enorm", self.w["embed_tokens.weight"][tokens[i + k]])
                state = self.norm(f"{name}.hnorm", hs[i])
                xs.append(self.w[f"{name}.eh_proj.weight"] @ torch.cat([embedded, state]))
            xs = self.block(f"{name}.block", xs, list(range(len(xs))), [0] * len(xs))
            hs = [self.norm(f"{name}.norm", x) for x in xs]
            depths.append(hs)
        return depths

    def nll(self, h: Tensor, token: int) -> Tensor:
        """-log P[token] by the one shared head."""
        return -torch.log_softmax(self.w["lm_head.weight"] @ h, 0)[token]

    def loss(self, tokens: list[int], mtp_weight: float) -> Tensor:
        """Equations 24 and 25 with the main loss, of T + 1 tokens: depth k has T - k terms, each sum over T."""
        inputs, total = tokens[:-1], len(tokens) - 1
        hs = self.hidden(inputs)
        loss = sum(self.nll(h, t) for h, t in zip(hs, tokens[1:])) / total
        depths = self.mtp(inputs, hs)
        for k, states in enumerate(depths, start=1):
            terms = [self.nll(states[i], tokens[i + k + 1]) for i in range(total - k)]
            loss = loss + mtp_weight / len(depths) * sum(terms) / total
        return loss


def sequence_balance(scores: list[list[Tensor]], top_k: int) -> Tensor:
    """Equations 17 to 20 without alpha, of one sequence: scores[t][i] is s_{i,t}."""
    length, experts = len(scores), len(scores[0])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(experts):
        hits = sum(i in sorted(range(experts), key=lambda e: -row[e].item())[:top_k] for row in scores)
        f = experts / (top_k * length) * hits
        p = sum(row[i] / sum(row) for row in scores) / length
        total = total + f * p
    return total
