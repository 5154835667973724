"""Weight gradient of the grouped FP8 product, in plain torch. Letters: E experts, N out, K in, R rows, C chunks of 128 rows."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 128


def grouped_wgrad_fp8(
    grad_t: Tensor,
    grad_scale_t: Tensor,
    rows_t: Tensor,
    rows_scale_t: Tensor,
    padded_start_E: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    accumulate: bool = False,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """dW[e] = sum over the expert's chunks of (codes @ codes^T of the chunk) * scales, each chunk added in ``compute``.

    ``compute=float64`` gives the oracle. The starts are read on the host.
    """
    starts = padded_start_E.tolist()
    N, K, E = grad_t.shape[0], rows_t.shape[0], len(starts) - 1
    dtype = out.dtype if out is not None else out_dtype
    result = torch.empty(E, N, K, dtype=dtype, device=grad_t.device) if out is None else out
    for e, (begin, end) in enumerate(pairwise(starts)):
        total = result[e].to(compute) if accumulate else torch.zeros(N, K, dtype=compute, device=grad_t.device)
        for chunk in range(begin // CHUNK, end // CHUNK):
            rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            partial = grad_t[:, rows].to(compute) @ rows_t[:, rows].to(compute).t()
            scale_N, scale_K = grad_scale_t[chunk].to(compute), rows_scale_t[chunk].to(compute)
            total += partial * scale_N[:, None] * scale_K[None, :]
        result[e] = total.to(dtype)
    return result
