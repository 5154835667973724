"""One-sided exchange of tokens between the GPUs of a node (report §3.2.2): rows are stored straight into the peers' memory.

Spec: ref.all_to_all. Letters: W ranks, T tokens a rank has room for, K chosen a token, L experts a rank, D width, R rows
of this rank's experts, S = W * T slots for tokens that arrive.

A token travels once to every rank that holds one of its experts and is expanded there; what comes back is one summed row a
token and rank. Token t of rank s lies in slot s * T + t at whatever rank it goes to, and its sum comes from rank d into
slot d * T + t: nobody has to agree on places, no count is exchanged, and the slots cannot overflow. Only the expanded rows
have a capacity; ``place`` notes on the device how many it would have needed.

    dispatch   send, wait, place, expand          its gradient   reduce, send_back, wait, collect
    combine    reduce, send_back, wait, collect   its gradient   send, wait, expand

Order between ranks. Every program of a send adds one to the receiver's counter with release semantics at system scope
after its stores; ``wait`` polls its own counters with acquire until all programs of this exchange have added theirs.
There are two halves, used in turn. An exchange is waited for and read before the next one is sent, so whoever sends
exchange n + 2 has seen every peer's exchange n + 1, which that peer sent after it had read exchange n: no half is written
while it is read. Two exchanges that are in flight at once need two sets of ``Buffers``.

The host knows nothing: exchanges are counted on the device, so a captured graph can be replayed. A wait that lasts too
long gives up and leaves a mark in ``state`` instead of hanging the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.buffers import EXCHANGES, FLAGS, LATE, NEEDED, TILE, Buffers
from litseek_kernels.e4m3 import from_e4m3

E4M3 = torch.float8_e4m3fn
_ROWS, _PIECE, _STEP, _WARPS = 16, 512, 4096, 16
"""Of a send: tokens and 32-bit words of each that one program moves at a time (32 KiB, four 16-byte loads a thread), and how
many choices, weights or scales."""
_SORT_ROWS, _SORT_STEP = 1024, 128


def send(
    buffers: Buffers,
    rows_TD: Tensor,
    expert_TK: Tensor,
    num_local: int,
    weight_TK: Tensor | None = None,
    scale_Tk: Tensor | None = None,
    choices: bool = True,
) -> None:
    """Each token's row, choices, weights (FP32) and scales to the ranks that hold its experts, rank d those from
    d * ``num_local`` on. Rows of this rank's own experts stay where they are. Scales are powers of two and travel as
    their exponents. Fewer tokens than there is room for are fine. Without ``choices`` only rows travel: for receivers that
    keep the places of an earlier exchange."""
    T, K = expert_TK.shape
    _check(buffers, rows_TD, T, K)
    if scale_Tk is not None and scale_Tk.shape != (T, -(-buffers.hidden // TILE)):
        raise ValueError(f"scales {tuple(scale_Tk.shape)} do not fit rows {tuple(rows_TD.shape)}")
    weight = None if weight_TK is None else weight_TK.float().contiguous()
    scale = None if scale_Tk is None else scale_Tk.contiguous()
    _launch_send(buffers, rows_TD, 0, expert_TK.contiguous(), 0, T, num_local, weight, 0, scale, choices)


def wait(buffers: Buffers) -> None:
    """Until everything of this exchange that is meant for this rank lies in its buffers."""
    flags = buffers.own.view(torch.int32)
    _wait_kernel[(1,)](
        flags, buffers.state, buffers.world, buffers.rank, buffers.programs, buffers.spins, EXCHANGES, LATE, num_warps=1
    )


def place(buffers: Buffers, num_local: int, capacity: int) -> tuple[Tensor, Tensor]:
    """position_SK int32: the row of each choice that is an expert of this rank, sorted by expert and stably, else -1;
    count_L int64. Rows past ``capacity`` are -1 and not counted; how many were wanted is kept in ``state[NEEDED]``."""
    total, device = buffers.slots * buffers.top_k, buffers.own.device
    position = torch.empty(buffers.slots, buffers.top_k, dtype=torch.int32, device=device)
    count = torch.empty(num_local, dtype=torch.int64, device=device)
    blocks, width = max(triton.cdiv(total, _SORT_ROWS), 1), triton.next_power_of_2(num_local)
    partial = torch.empty(blocks, num_local, dtype=torch.int32, device=device)
    choice, half = buffers.at(0, torch.int32)
    _count_kernel[(blocks,)](
        choice, half, buffers.state, partial, total, num_local, _SORT_ROWS, _SORT_STEP, width, EXCHANGES, num_warps=4
    )
    _place_kernel[(blocks,)](
        choice, half, buffers.state, partial, position, count, total, num_local, blocks, capacity,
        _SORT_ROWS, _SORT_STEP, width, max(4096 // width, 8), EXCHANGES, NEEDED, num_warps=4,
    )  # fmt: skip
    return position, count


def expand(
    buffers: Buffers, own_TD: Tensor, position_SK: Tensor, capacity: int, dtype: torch.dtype,
    weighted: bool = False, scaled: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """rows (capacity, D) sorted by expert, in ``dtype`` and, where ``scaled``, times their scales; with ``weighted`` also
    weight_R float32. ``own_TD`` is what this rank sent. Rows past the last one of ``position_SK`` are not written."""
    rows = torch.empty(capacity, buffers.hidden, dtype=dtype, device=own_TD.device)
    weight = torch.empty(capacity if weighted else 0, dtype=torch.float32, device=own_TD.device)
    seen = torch.uint8 if own_TD.dtype == E4M3 else own_TD.dtype
    assert scaled == (seen == torch.uint8), "codes have scales, other rows have none"
    rows_in, half = buffers.at(None, seen)
    weight_in, _ = buffers.at(1, torch.float32)
    scale_in, half_bytes = buffers.at(2, torch.uint8)
    if buffers.slots:
        grid, meta = _tokens_and_pieces(buffers.slots, buffers.hidden)
        _expand_kernel[grid](
            own_TD.contiguous().view(seen), rows_in, half, scale_in, half_bytes, weight_in, half_bytes // 4, buffers.state,
            position_SK, rows, weight, buffers.tokens, buffers.hidden, buffers.rank, buffers.top_k,
            triton.next_power_of_2(buffers.top_k), scaled, weighted, EXCHANGES, **meta,
        )  # fmt: skip
    return rows, weight if weighted else None


def reduce(
    buffers: Buffers, rows_RD: Tensor, position_SK: Tensor, weight_R: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What ``send_back`` sends: (W - 1, T, D), for each other rank (the next one first) and token the sum of its rows
    here, in rows' dtype; and (W, T, K) the numbers ``weight_R`` of its choices here. Own sums go to their slots at once."""
    W, T, K, D = buffers.world, buffers.tokens, buffers.top_k, buffers.hidden
    rows_RD = rows_RD.contiguous()
    sums = torch.empty(W - 1, T, D, dtype=rows_RD.dtype, device=rows_RD.device)
    numbers = torch.empty(W if weight_R is not None else 0, T, K, dtype=torch.float32, device=rows_RD.device)
    own, half = buffers.at(None, rows_RD.dtype)
    if buffers.slots:
        grid, meta = _tokens_and_pieces(buffers.slots, D)
        weight = numbers if weight_R is None else weight_R.float().contiguous()
        _reduce_kernel[grid](
            rows_RD, position_SK, sums, own, half, weight, numbers, buffers.state, T, D, buffers.rank, W, K,
            triton.next_power_of_2(K), weight_R is not None, EXCHANGES, **meta,
        )  # fmt: skip
    return sums, numbers


def send_back(buffers: Buffers, sums: Tensor, numbers: Tensor, position_SK: Tensor) -> None:
    """``reduce``'s result to the tokens' ranks."""
    T, D, K = buffers.tokens, buffers.hidden, buffers.top_k
    weight = numbers if numbers.numel() else None
    words = D * sums.itemsize // 4
    _launch_send(buffers, sums, T * words, position_SK, T * K, T, 0, weight, T * K, None, choices=False, back=True)


def collect(
    buffers: Buffers, expert_TK: Tensor, num_local: int, dtype: torch.dtype, weighted: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y (T, D) in ``dtype``, the sum over the ranks that hold a token's experts; with ``weighted`` also the numbers (T, K)
    float32 that came back with them."""
    T, K = expert_TK.shape
    y = torch.empty(T, buffers.hidden, dtype=dtype, device=buffers.own.device)
    numbers = torch.empty(T if weighted else 0, K, dtype=torch.float32, device=buffers.own.device)
    rows_in, half = buffers.at(None, dtype)
    weight_in, half_bytes = buffers.at(1, torch.float32)
    if T:
        grid, meta = _tokens_and_pieces(T, buffers.hidden)
        _collect_kernel[grid](
            rows_in, half, weight_in, half_bytes, buffers.state, expert_TK.contiguous(), y, numbers, buffers.tokens,
            buffers.hidden, num_local, buffers.world, K, triton.next_power_of_2(K), weighted, EXCHANGES, **meta,
        )  # fmt: skip
    return y, numbers if weighted else None


def _check(buffers: Buffers, rows_TD: Tensor, T: int, K: int) -> None:
    fits = rows_TD.shape == (T, buffers.hidden) and rows_TD.itemsize <= buffers.itemsize
    if not fits or buffers.tokens < T or buffers.top_k != K:
        raise ValueError(
            f"the exchange has room for {buffers.tokens} tokens of {buffers.hidden} numbers of {buffers.itemsize} bytes "
            f"with {buffers.top_k} choices each, got {tuple(rows_TD.shape)} {rows_TD.dtype} with choices ({T}, {K})"
        )


def _launch_send(
    buffers: Buffers, rows: Tensor, rows_stride: int, table: Tensor, table_stride: int, T: int, num_local: int,
    weight: Tensor | None, weight_stride: int, scale: Tensor | None, choices: bool, back: bool = False,
) -> None:  # fmt: skip
    choice_at, weight_at, scale_at, half = buffers.parts
    few = 4 * _ROWS * buffers.programs > T  # pieces of few tokens, so that every program has some
    tile, piece = (_ROWS // 4, _PIECE * 4) if few else (_ROWS, _PIECE)
    _send_kernel[(buffers.programs,)](
        buffers.peers_W, buffers.state, rows.contiguous().view(torch.int32), rows_stride, table, table_stride,
        rows if weight is None else weight, weight_stride, rows if scale is None else scale,
        T, buffers.tokens, buffers.hidden * rows.itemsize // 4, triton.cdiv(buffers.hidden, TILE), num_local,
        FLAGS, half, choice_at, weight_at, scale_at, buffers.rank, buffers.world, buffers.top_k,
        triton.next_power_of_2(buffers.top_k), back, choices, weight is not None, scale is not None, tile, piece, _STEP,
        EXCHANGES, num_warps=_WARPS,
    )  # fmt: skip


def _tokens_and_pieces(tokens: int, D: int) -> tuple[tuple[int, int], dict[str, int]]:
    """As for the local permutation: pieces of 512 with two warps move at memory speed."""
    block = min(triton.next_power_of_2(D), 512)
    return (tokens, triton.cdiv(D, block)), {"BLOCK_D": block, "num_warps": 2}


# ---- kernels


@triton.jit
def _send_kernel(
    peers_ptr, state_ptr, rows_ptr, rows_stride, table_ptr, table_stride, weight_ptr, weight_stride, scale_ptr,
    T, ROOM, words, blocks_k, num_local, FLAGS, half_bytes, choice_at, weight_at, scale_at, me, W, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BACK: tl.constexpr, CHOICES: tl.constexpr, WEIGHTS: tl.constexpr, SCALES: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr, EXCHANGES: tl.constexpr,
):  # fmt: skip
    """``table`` holds choices, and a token's row goes to the ranks of its experts; or, BACK, positions, and the rows that go
    to rank d are those with a position in its part."""
    first, programs = tl.program_id(0), tl.num_programs(0)
    half = FLAGS + (tl.load(state_ptr + EXCHANGES) & 1).to(tl.int64) * half_bytes
    i = tl.arange(0, STEP)
    for hop in range(0, W):
        d = (me + hop) % W
        base = tl.load(peers_ptr + d) + half
        if CHOICES:
            to = tl.multiple_of((base + choice_at).to(tl.pointer_type(tl.int32)), 16) + me * ROOM * K
            for start in range(first * STEP, ROOM * K, programs * STEP):
                at = start + i
                local = tl.load(table_ptr + at, mask=at < T * K, other=-1).to(tl.int32) - d * num_local
                local = tl.where((at < T * K) & (local >= 0) & (local < num_local), local, -1)
                tl.store(to + at, local, mask=at < ROOM * K)
        if WEIGHTS:
            to = tl.multiple_of((base + weight_at).to(tl.pointer_type(tl.float32)), 16) + me * ROOM * K
            for start in range(first * STEP, T * K, programs * STEP):
                at = start + i
                weight = tl.load(weight_ptr + d * weight_stride + at, mask=at < T * K, other=0.0)
                tl.store(to + at, weight, mask=at < T * K)
        if SCALES:
            to = tl.multiple_of((base + scale_at).to(tl.pointer_type(tl.uint8)), 16) + me * ROOM * blocks_k
            for start in range(first * STEP, T * blocks_k, programs * STEP):
                at = start + i
                scale = tl.load(scale_ptr + at, mask=at < T * blocks_k, other=0.0)
                exponent = (scale.to(tl.int32, bitcast=True) >> 23) & 0xFF
                tl.store(to + at, exponent.to(tl.uint8), mask=at < T * blocks_k)

    k = tl.arange(0, BLOCK_K)
    w = tl.arange(0, PIECE)
    rows = rows_ptr
    for hop in range(1, W):
        d = (me + hop) % W
        to = tl.multiple_of((tl.load(peers_ptr + d) + half).to(tl.pointer_type(tl.int32)), 16)
        for tile in range(first, tl.cdiv(T, ROWS), programs):
            t = tile * ROWS + tl.arange(0, ROWS)
            live = (t < T)[:, None] & (k < K)[None, :]
            entry = tl.load(table_ptr + d * table_stride + t[:, None] * K + k[None, :], mask=live, other=-1)
            if BACK:
                entry = tl.where(entry >= 0, 1, 0)
            else:
                entry = tl.where((entry >= d * num_local) & (entry < (d + 1) * num_local), 1, 0)
            wanted = (tl.max(entry, 1) > 0)[:, None]
            source = t.to(tl.int64)[:, None] * words
            target = (me * ROOM + t).to(tl.int64)[:, None] * words
            for piece in range(0, words, PIECE):
                column = (piece + w)[None, :]
                mask = wanted & (column < words)
                tl.store(to + target + column, tl.load(rows + source + column, mask=mask), mask=mask)
        rows += rows_stride

    tl.debug_barrier()  # every thread's stores come before the release of one
    for hop in range(1, W):
        d = (me + hop) % W
        flag = tl.load(peers_ptr + d).to(tl.pointer_type(tl.int32)) + me
        tl.atomic_add(flag, 1, sem="release", scope="sys")


@triton.jit
def _wait_kernel(
    flags_ptr, state_ptr, W, me, programs, spins, EXCHANGES: tl.constexpr, LATE: tl.constexpr
):  # fmt: skip
    exchanges = tl.load(state_ptr + EXCHANGES) + 1
    for rank in range(0, W):
        if rank != me:
            missing = exchanges * programs - tl.atomic_add(flags_ptr + rank, 0, sem="acquire", scope="sys")
            polls = 0
            while (missing > 0) & (polls < spins):
                missing = exchanges * programs - tl.atomic_add(flags_ptr + rank, 0, sem="acquire", scope="sys")
                polls += 1
            if missing > 0:
                tl.atomic_add(state_ptr + LATE, 1)
    tl.store(state_ptr + EXCHANGES, exchanges)


@triton.jit
def _last_half(state_ptr, half, EXCHANGES: tl.constexpr):
    """Where the exchange that was waited for last lies."""
    return ((tl.load(state_ptr + EXCHANGES) - 1) & 1).to(tl.int64) * half


@triton.jit
def _count_kernel(
    choice_ptr, half, state_ptr, partial_ptr, total, L, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_L: tl.constexpr,
    EXCHANGES: tl.constexpr,
):  # fmt: skip
    """partial[b, l]: how many of block b's choices are expert l."""
    choice_ptr += _last_half(state_ptr, half, EXCHANGES)
    expert = tl.arange(0, BLOCK_L)
    count = tl.zeros([BLOCK_L], tl.int32)
    for step in range(0, ROWS, STEP):
        r = tl.program_id(0) * ROWS + step + tl.arange(0, STEP)
        choice = tl.load(choice_ptr + r, mask=r < total, other=-1)
        count += tl.sum((choice[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(partial_ptr + tl.program_id(0) * L + expert, count, mask=expert < L)


@triton.jit
def _place_kernel(
    choice_ptr, half, state_ptr, partial_ptr, position_ptr, count_ptr, total, L, blocks, capacity,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_B: tl.constexpr,
    EXCHANGES: tl.constexpr, NEEDED: tl.constexpr,
):  # fmt: skip
    """A choice's row: its expert's start, that expert's rows in earlier blocks, and those before it in this block."""
    choice_ptr += _last_half(state_ptr, half, EXCHANGES)
    me = tl.program_id(0)
    expert = tl.arange(0, BLOCK_L)
    sums = tl.zeros([BLOCK_L], tl.int32)
    before = tl.zeros([BLOCK_L], tl.int32)
    for start in range(0, blocks, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        live = (b[:, None] < blocks) & (expert[None, :] < L)
        part = tl.load(partial_ptr + b[:, None] * L + expert[None, :], mask=live, other=0)
        sums += tl.sum(part, 0)
        before += tl.sum(tl.where(b[:, None] < me, part, 0), 0)
    ends = tl.cumsum(sums, 0)
    place = ends - sums + before
    if me == 0:
        kept = tl.minimum(ends, capacity) - tl.minimum(ends - sums, capacity)
        tl.store(count_ptr + expert, kept.to(tl.int64), mask=expert < L)
        tl.atomic_max(state_ptr + NEEDED, tl.sum(sums, 0))

    i = tl.arange(0, STEP)
    for step in range(0, ROWS, STEP):
        r = me * ROWS + step + i
        choice = tl.load(choice_ptr + r, mask=r < total, other=-1)
        other = tl.load(choice_ptr + me * ROWS + step + i, mask=me * ROWS + step + i < total, other=-1)
        same = choice[:, None] == other[None, :]
        rank = tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
        mine = choice[:, None] == expert[None, :]
        row = rank + tl.sum(tl.where(mine, place[None, :], 0), 1)
        tl.store(position_ptr + r, tl.where((choice >= 0) & (row < capacity), row, -1), mask=r < total)
        place += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _expand_kernel(
    own_ptr, buffer_ptr, half, scale_ptr, half_scale, weight_ptr, half_weight, state_ptr, position_ptr, rows_ptr,
    row_weight_ptr, ROOM, D, me, K: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr,
    EXCHANGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    position = tl.load(position_ptr + slot * K + k, mask=k < K, other=-1)
    if tl.max(position, 0) >= 0:
        source = slot // ROOM
        t = slot % ROOM
        if source == me:
            x = tl.load(own_ptr + t * D + d, mask=d < D)
        else:
            x = tl.load(buffer_ptr + _last_half(state_ptr, half, EXCHANGES) + slot * D + d, mask=d < D)
        if SCALED:
            scales = scale_ptr + _last_half(state_ptr, half_scale, EXCHANGES)
            exponent = tl.load(scales + slot * tl.cdiv(D, 128) + d // 128, mask=d < D, other=0).to(tl.int32)
            scale = tl.where(exponent == 255, 0x7FC00000, exponent << 23).to(tl.float32, bitcast=True)
            x = from_e4m3(x) * scale
        for j in tl.static_range(K):
            row = tl.load(position_ptr + slot * K + j).to(tl.int64)
            tl.store(rows_ptr + row * D + d, x.to(rows_ptr.dtype.element_ty), mask=(row >= 0) & (d < D))
        if WEIGHTED:
            here = (position >= 0) & (tl.program_id(1) == 0)
            weights = weight_ptr + _last_half(state_ptr, half_weight, EXCHANGES)
            tl.store(row_weight_ptr + position, tl.load(weights + slot * K + k, mask=here, other=0.0), mask=here)


@triton.jit
def _reduce_kernel(
    rows_ptr, position_ptr, sums_ptr, own_ptr, half, weight_ptr, numbers_ptr, state_ptr, ROOM, D, me, W,
    K: tl.constexpr, BLOCK_K: tl.constexpr, WEIGHTED: tl.constexpr, EXCHANGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    position = tl.load(position_ptr + slot * K + k, mask=k < K, other=-1)
    if tl.max(position, 0) >= 0:
        total = tl.zeros([BLOCK_D], tl.float32)
        for j in tl.static_range(K):
            row = tl.load(position_ptr + slot * K + j).to(tl.int64)
            total += tl.load(rows_ptr + row * D + d, mask=(row >= 0) & (d < D), other=0.0).to(tl.float32)
        hop = (slot // ROOM + W - me) % W
        out = total.to(rows_ptr.dtype.element_ty)
        if hop == 0:
            next_half = (tl.load(state_ptr + EXCHANGES) & 1).to(tl.int64) * half
            tl.store(own_ptr + next_half + slot * D + d, out, mask=d < D)
        else:
            tl.store(sums_ptr + ((hop - 1) * ROOM + slot % ROOM) * D + d, out, mask=d < D)
    if WEIGHTED:
        once = (k < K) & (tl.program_id(1) == 0)
        number = tl.load(weight_ptr + position, mask=once & (position >= 0), other=0.0)
        tl.store(numbers_ptr + slot * K + k, number, mask=once)


@triton.jit
def _collect_kernel(
    buffer_ptr, half, weight_ptr, half_weight, state_ptr, expert_ptr, y_ptr, numbers_ptr, ROOM, D, num_local,
    W: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, WEIGHTED: tl.constexpr, EXCHANGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    rank = tl.load(expert_ptr + t * K + k, mask=k < K, other=-1).to(tl.int32)
    rank = tl.where(k < K, rank // num_local, -1)
    buffer_ptr += _last_half(state_ptr, half, EXCHANGES)
    total = tl.zeros([BLOCK_D], tl.float32)
    for w in tl.static_range(W):
        here = tl.max((rank == w).to(tl.int32), 0) > 0
        total += tl.load(buffer_ptr + (w * ROOM + t) * D + d, mask=here & (d < D), other=0.0).to(tl.float32)
    tl.store(y_ptr + t * D + d, total.to(y_ptr.dtype.element_ty), mask=d < D)
    if WEIGHTED:
        once = (k < K) & (tl.program_id(1) == 0) & (rank >= 0) & (rank < W)
        weights = weight_ptr + _last_half(state_ptr, half_weight, EXCHANGES)
        tl.store(numbers_ptr + t * K + k, tl.load(weights + (rank * ROOM + t) * K + k, mask=once, other=0.0), mask=once)
