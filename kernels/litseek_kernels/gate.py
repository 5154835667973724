"""The gate after its logits, in one kernel forward and one backward: sigmoid, balance bias, group choice, top-k,
normalised weights, loads, and what the balance loss needs. Spec: ref.gate (report §2.1.2).

Letters: T = B * S tokens in B sequences of S, E experts in G groups, K chosen.

Choice compares integers: a float32's bits, mapped so that integers order as floats do and NaN is on top (as torch.topk
has it), then the lower index first. torch.topk promises no order of ties, and on the CPU has none; this kernel does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.operator import operator
from litseek_kernels.ref import gate as ref
from litseek_kernels.ref.gate import Gate

__all__ = ["Gate", "gate"]


def gate(
    logit_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    experts_per_group_score: int = 2,
    normalise: bool = True,
    scaling: float = 1.0,
    sequences: int = 0,
) -> Gate:
    """Experts, weights and loads of float32 logits; with ``sequences`` B also the balance loss's statistics."""
    T, E = logit_TE.shape
    if num_groups > 1 and (E % num_groups or not 1 <= experts_per_group_score <= E // num_groups):
        raise ValueError(f"{experts_per_group_score} experts score each of {num_groups} groups of {E} experts")
    if not 1 <= top_k <= E:
        raise ValueError(f"{top_k} experts are to be chosen of {E}")
    if sequences and T % sequences:
        raise ValueError(f"{T} tokens are not {sequences} sequences of one length")
    setting = (top_k, num_groups, top_groups, experts_per_group_score, normalise, scaling, sequences)
    if not runs_kernel(logit_TE):
        return ref.gate(logit_TE, bias_E, *setting)
    if logit_TE.dtype != torch.float32 or bias_E.dtype != torch.float32:
        raise ValueError(f"the gate wants float32 logits and bias, not {logit_TE.dtype} and {bias_E.dtype}")
    expert_TK, weight_TK, load_E, share_BE, probability_BE = _gate(logit_TE, bias_E, *setting)
    return Gate(expert_TK, weight_TK, load_E, share_BE.detach(), probability_BE)


# ---- operators


@operator("litseek::gate")
def _gate(
    logit_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    experts_per_group_score: int,
    normalise: bool,
    scaling: float,
    sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logit_TE, (T, E), B = logit_TE.contiguous(), logit_TE.shape, max(sequences, 1)
    expert, weight, load, share, probability = _empty_gate(logit_TE, top_k, sequences)
    S, groups = T // B, num_groups if top_groups < num_groups else 1
    sizes = triton.next_power_of_2(groups), triton.next_power_of_2(E // groups)
    rows = _rows(sizes[0] * sizes[1])
    blocks = triton.cdiv(S, rows)
    load.zero_()
    hits = torch.zeros(sequences, E, dtype=torch.int32, device=load.device)
    partial = torch.empty(sequences, blocks, E, dtype=torch.float32, device=load.device)
    if T:
        _gate_kernel[(B, blocks)](
            logit_TE, bias_E, expert, weight, load, hits, partial, S, blocks, scaling, E, groups, E // groups,
            top_groups, experts_per_group_score, top_k, normalise, sequences > 0,
            rows, *sizes, triton.next_power_of_2(top_k), num_warps=4,
        )  # fmt: skip
    if sequences:
        _statistics_kernel[(B,)](
            hits, partial, share, probability, S, blocks, E, triton.next_power_of_2(E), rows, num_warps=4
        )
    return expert, weight, load, share, probability


@_gate.register_fake
def _(logit_TE, bias_E, top_k, num_groups, top_groups, experts_per_group_score, normalise, scaling, sequences):
    return _empty_gate(logit_TE, top_k, sequences)


def _empty_gate(logit_TE: Tensor, top_k: int, sequences: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, E = logit_TE.shape
    return (
        logit_TE.new_empty(T, top_k, dtype=torch.int64),
        logit_TE.new_empty(T, top_k),
        logit_TE.new_empty(E, dtype=torch.int64),
        logit_TE.new_empty(sequences, E),
        logit_TE.new_empty(sequences, E),
    )


@operator("litseek::gate_backward")
def _gate_backward(
    logit_TE: Tensor,
    expert_TK: Tensor,
    grad_weight_TK: Tensor,
    grad_probability_BE: Tensor,
    normalise: bool,
    scaling: float,
) -> Tensor:
    logit_TE, (T, E), sequences = logit_TE.contiguous(), logit_TE.shape, grad_probability_BE.shape[0]
    grad_logit = torch.empty_like(logit_TE)
    B, width = max(sequences, 1), triton.next_power_of_2(E)
    S, rows = T // B, _rows(width)
    if T:
        _gate_backward_kernel[(B, triton.cdiv(S, rows))](
            logit_TE, expert_TK, grad_weight_TK.contiguous(), grad_probability_BE.contiguous(), grad_logit, S, scaling,
            E, expert_TK.shape[1], normalise, sequences > 0, rows, width, num_warps=4,
        )  # fmt: skip
    return grad_logit


@_gate_backward.register_fake
def _(logit_TE, expert_TK, grad_weight_TK, grad_probability_BE, normalise, scaling):
    return logit_TE.new_empty(logit_TE.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.setting = inputs[6], inputs[7]


def _backward(ctx, grad_expert, grad_weight, grad_load, grad_share, grad_probability):
    logit_TE, expert_TK = ctx.saved_tensors
    return _gate_backward(logit_TE, expert_TK, grad_weight, grad_probability, *ctx.setting), *[None] * 8


_gate.register_autograd(_backward, setup_context=_save)


def _rows(width: int) -> int:
    """Tokens of one program: 16 scores a thread."""
    return max(2048 // width, 1)


# ---- kernels

_LOW = tl.constexpr(-(2**63))
_MINUS_INF = tl.constexpr((-(2**31) + 2**23 - 1) * 2**32)
"""Below every packed value; -inf packed, without its index."""


@triton.jit
def _order(x):
    """int32 that order as the float32 do; +0 equals -0, NaN is above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _pack(x, index):
    """int64: of two, the one with the larger float is larger, and of equal floats the one with the lower index."""
    return _order(x).to(tl.int64) * 4294967296 + (65535 - index)


@triton.jit
def _unpacked_index(packed):
    return 65535 - (packed & 65535).to(tl.int32)


@triton.jit
def _unpacked_value(packed):
    key = (packed >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _highest(packed):
    """Of every token's (groups, experts)."""
    return tl.max(tl.max(packed, 2), 1)


@triton.jit
def _gate_kernel(
    logit_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    load_ptr,
    hits_ptr,
    partial_ptr,
    S,
    blocks,
    scaling,
    E: tl.constexpr,
    G: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_G: tl.constexpr,
    BEST: tl.constexpr,
    K: tl.constexpr,
    NORMALISE: tl.constexpr,
    BALANCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of one sequence's tokens. Scores are a tile (tokens, groups, experts of a group)."""
    sequence, block = tl.program_id(0), tl.program_id(1)
    s = block * ROWS + tl.arange(0, ROWS)
    t = sequence.to(tl.int64) * S + s
    g, i = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_S)[None, :]
    e = g * SIZE + i
    real = (g < G) & (i < SIZE)
    live = (s < S)[:, None, None] & real[None, :, :]
    logit = tl.load(logit_ptr + t[:, None, None] * E + e[None, :, :], mask=live, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit))
    bias = tl.load(bias_ptr + e, mask=real, other=0.0)
    packed = tl.where(real[None, :, :], _pack(score + bias[None, :, :], e[None, :, :]), _LOW)

    if G > 1:
        group = tl.zeros([ROWS, BLOCK_G], tl.float32)
        rest = packed
        for _ in tl.static_range(BEST):
            best = tl.max(rest, 2)
            group += _unpacked_value(best)
            rest = tl.where(rest == best[:, :, None], _LOW, rest)
        column = tl.arange(0, BLOCK_G)[None, :]
        groups = tl.where(column < G, _pack(group, column), _LOW)
        kept = column < 0
        for _ in tl.static_range(TOP_G):
            mine = groups == tl.max(groups, 1)[:, None]
            kept = kept | mine
            groups = tl.where(mine, _LOW, groups)
        masked = tl.where(real, _MINUS_INF + (65535 - e).to(tl.int64), _LOW)
        packed = tl.where(kept[:, :, None], packed, masked[None, :, :])

    k = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros([ROWS, BLOCK_K], tl.int32)
    weight = tl.zeros([ROWS, BLOCK_K], tl.float32)
    hit = tl.zeros([ROWS, BLOCK_G, BLOCK_S], tl.int32)
    for j in tl.static_range(K):
        best = _highest(packed)
        mine = packed == best[:, None, None]
        chosen = tl.where(k == j, _unpacked_index(best)[:, None], chosen)
        weight = tl.where(k == j, tl.sum(tl.sum(tl.where(mine, score, 0.0), 2), 1)[:, None], weight)
        hit += mine.to(tl.int32)
        packed = tl.where(mine, _LOW, packed)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 1) + 1e-20)[:, None]
    out = t[:, None] * K + k
    writes = (s < S)[:, None] & (k < K)
    tl.store(expert_ptr + out, chosen.to(tl.int64), mask=writes)
    tl.store(weight_ptr + out, weight * scaling, mask=writes)
    load = tl.sum(tl.where(live, hit, 0), 0)
    tl.atomic_add(load_ptr + e, load.to(tl.int64), mask=real & (load > 0), sem="relaxed")  # integers: order is nothing

    if BALANCE:
        # what the K highest unbiased scores, of all groups, would have chosen
        packed = tl.where(real[None, :, :], _pack(score, e[None, :, :]), _LOW)
        hit = tl.zeros([ROWS, BLOCK_G, BLOCK_S], tl.int32)
        for _ in tl.static_range(K):
            mine = packed == _highest(packed)[:, None, None]
            hit += mine.to(tl.int32)
            packed = tl.where(mine, _LOW, packed)
        hits = tl.sum(tl.where(live, hit, 0), 0)
        tl.atomic_add(hits_ptr + sequence * E + e, hits, mask=real & (hits > 0), sem="relaxed")
        score = tl.where(live, score, 0.0)
        total = tl.where(s < S, tl.sum(tl.sum(score, 2), 1), 1.0)
        share = tl.sum(score / total[:, None, None], 0)
        tl.store(partial_ptr + (sequence * blocks + block) * E + e, share, mask=real)


@triton.jit
def _statistics_kernel(
    hits_ptr, partial_ptr, share_ptr, probability_ptr, S, blocks, E, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
):
    """One sequence: counts and sums to means."""
    sequence = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, blocks, ROWS):
        b = start + tl.arange(0, ROWS)[:, None]
        live = (b < blocks) & (e[None, :] < E)
        total += tl.sum(tl.load(partial_ptr + (sequence * blocks + b) * E + e[None, :], mask=live, other=0.0), 0)
    hits = tl.load(hits_ptr + sequence * E + e, mask=e < E, other=0)
    tl.store(share_ptr + sequence * E + e, hits.to(tl.float32) / S, mask=e < E)
    tl.store(probability_ptr + sequence * E + e, total / S, mask=e < E)


@triton.jit
def _gate_backward_kernel(
    logit_ptr,
    expert_ptr,
    grad_weight_ptr,
    grad_probability_ptr,
    grad_logit_ptr,
    S,
    scaling,
    E: tl.constexpr,
    K: tl.constexpr,
    NORMALISE: tl.constexpr,
    BALANCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    sequence = tl.program_id(0)
    s = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t = sequence.to(tl.int64) * S + s
    e = tl.arange(0, BLOCK_E)[None, :]
    live = (s < S)[:, None] & (e < E)
    logit = tl.load(logit_ptr + t[:, None] * E + e, mask=live, other=0.0)
    score = tl.where(live, 1.0 / (1.0 + tl.exp(-logit)), 0.0)
    grad = tl.zeros([ROWS, BLOCK_E], tl.float32)
    chosen = e < 0
    for k in tl.static_range(K):
        expert = tl.load(expert_ptr + t * K + k, mask=s < S, other=-1).to(tl.int32)
        mine = expert[:, None] == e
        grad = tl.where(mine, tl.load(grad_weight_ptr + t * K + k, mask=s < S, other=0.0)[:, None], grad)
        chosen = chosen | mine
    if NORMALISE:
        total = tl.sum(tl.where(chosen, score, 0.0), 1)[:, None] + 1e-20
        mean = tl.sum(tl.where(chosen, grad * score, 0.0), 1)[:, None] / total
        grad = tl.where(chosen, (grad - mean) / total, 0.0)
    grad *= scaling
    if BALANCE:
        slope = tl.load(grad_probability_ptr + sequence * E + e, mask=e < E, other=0.0)
        total = tl.where((s < S)[:, None], tl.sum(score, 1)[:, None], 1.0)
        grad += (slope - tl.sum(slope * score, 1)[:, None] / total) / (total * S)
    tl.store(grad_logit_ptr + t[:, None] * E + e, grad * score * (1.0 - score), mask=live)
