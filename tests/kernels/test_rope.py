"""MLA's heads against float64. Relative errors: 1e-6 in float32; in BF16, rounded once, 2.5e-3 (5e-3 in the
interpreter, whose stores cut off instead of rounding).
"""

import pytest
import torch
from litseek_kernels.ref import rope as ref
from litseek_kernels.rope import mla_heads
from litseek_kernels.testing import relative_error

SHAPES = [  # batch, length, heads, nope, rotary, value
    (2, 5, 3, 24, 8, 20),
    (1, 3, 16, 128, 64, 128),
    (1, 2, 20, 96, 32, 64),
    (2, 0, 4, 8, 4, 8),
    (3, 7, 1, 1, 2, 1),
]


def inputs(shape, dtype, device, shared_positions=False):
    b, s, h, n, r, v = shape
    q, kv = torch.randn(b, s, h * (n + r)), torch.randn(b, s, h * (n + v))
    latent = torch.randn(b, s, r + 16)
    angle = 100 * torch.randn(*(() if shared_positions else (b,)), s, r // 2)
    tensors = [t.to(device, dtype).requires_grad_() for t in (q, kv, latent)]
    return tensors, angle.cos().to(device), angle.sin().to(device)


def limit(dtype, device):
    return 1e-6 if dtype == torch.float32 else 2.5e-3 if device.type == "cuda" else 5e-3


def run(function, tensors, cos, sin, shape, seeds):
    q, kv, latent = tensors
    # clones: q and its gradient are overwritten, and k_rope is a slice, as in the model
    out = function(q.clone(), kv, latent[..., 16:], cos, sin, shape[2])
    grads = torch.autograd.grad(out, tensors, [s.clone() for s in seeds])
    return [*(t.detach() for t in out), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared_positions", [False, True])
def test_forward_and_backward(shape, dtype, shared_positions, device):
    tensors, cos, sin = inputs(shape, dtype, device, shared_positions)
    b, s, h, n, r, v = shape
    seeds = [torch.randn(b, s, h, width, device=device).to(dtype) for width in (n + r, n + r, v)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want = run(ref.mla_heads, wide, cos.double(), sin.double(), shape, [seed.double() for seed in seeds])
    got = run(mla_heads, tensors, cos, sin, shape, seeds)
    names = ("q", "k", "v", "dq", "dkv", "dlatent")
    for name, mine, other in zip(names, got, want):
        assert mine.dtype == dtype, name
        assert relative_error(mine, other) <= limit(dtype, device), name
    # what is only moved stays as it was
    assert torch.equal(got[0][..., :n], tensors[0].unflatten(-1, (h, -1))[..., :n])
    assert torch.equal(got[2], tensors[1].unflatten(-1, (h, -1))[..., n:])


def test_rotation_is_on_interleaved_pairs(device):
    q = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]], device=device)  # no unrotated part but one number
    kv, angle = torch.zeros(1, 1, 2, device=device), torch.tensor([[[0.5, 1.0]]], device=device)
    q = torch.cat([torch.full_like(q[..., :1], 7.0), q], dim=-1)
    out, _, _ = mla_heads(q, kv, torch.zeros(1, 1, 4, device=device), angle.cos(), angle.sin(), 1)
    want = torch.tensor([7.0, 0.5, 1.0, 1.0, 1.0], device=device)
    want[1:] = torch.stack([angle[0, 0, 0].cos(), angle[0, 0, 0].sin(), -angle[0, 0, 1].sin(), angle[0, 0, 1].cos()])
    torch.testing.assert_close(out.flatten(), want)


def test_compiles_in_one_graph(device, monkeypatch):
    monkeypatch.setattr("litseek_kernels.rope.runs_kernel", lambda x: True)
    shape = (2, 5, 3, 24, 8, 20)
    tensors, cos, sin = inputs(shape, torch.float32, device)
    seeds = [torch.randn(2, 5, 3, width, device=device) for width in (32, 32, 20)]
    want = run(mla_heads, tensors, cos, sin, shape, seeds)
    compiled = torch.compile(mla_heads, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for got, wanted in zip(run(compiled, tensors, cos, sin, shape, seeds), want):
        assert torch.equal(got, wanted)


def test_refusals_name_the_shape(device):
    tensors, cos, sin = inputs((2, 5, 3, 24, 8, 20), torch.float32, device)
    q, kv, latent = (t.detach() for t in tensors)
    with pytest.raises(ValueError, match=r"5 heads.*\(2, 5, 96\)"):
        mla_heads(q, kv, latent[..., 16:], cos, sin, 5)
    with pytest.raises(ValueError, match=r"power of 2.*\(2, 5, 7\)"):
        mla_heads(q, kv, latent[..., 17:], cos, sin, 3)


def test_ops_are_registered(device):
    tensors, cos, sin = inputs((2, 5, 3, 24, 8, 20), torch.float32, device)
    q, kv, latent = (t.detach() for t in tensors)
    tests = ("test_schema", "test_faketensor")
    args = (q, kv, latent[..., 16:], cos, sin, 3)
    torch.library.opcheck(torch.ops.litseek.mla_heads, args, test_utils=tests)
    grads = [torch.randn(2, 5, 3, width, device=device) for width in (32, 32, 20)]
    torch.library.opcheck(torch.ops.litseek.mla_heads_backward, (*grads, cos, sin), test_utils=tests)
