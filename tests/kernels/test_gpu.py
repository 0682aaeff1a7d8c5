"""On a GPU: every kernel at the sizes of real models against plain torch in fp32, and attention by document.

What these sizes show and small ones do not: offsets beyond 2^31 elements, rows of several blocks, warps of
every count.
"""

from __future__ import annotations

import pytest
import torch

from luthier.kernels import varlen_attention
from luthier.kernels.cross_entropy import cross_entropy_, reference_cross_entropy
from luthier.kernels.document_layout import layout_of
from luthier.kernels.gated import KINDS, gated, reference_gated
from luthier.kernels.gated_mlp import gated_mlp, reference_gated_mlp
from luthier.kernels.linear_ce import linear_logps, reference_logps
from luthier.kernels.lora_linear import Linear, lora_linears, reference_lora_linears
from luthier.kernels.rms_norm import add_rms_norm, reference_rms_norm, rms_norm
from luthier.kernels.rotary import reference_rotary, rotary
from luthier.models import attention

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]
# Largest difference, relative to the largest value: sums of thousands of products in fp32; one or two roundings to
# 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False


def normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device=GPU).to(dtype).requires_grad_(grad)


def agree(
    found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], dtype: torch.dtype, factor: float = 1
) -> None:
    """Every tensor to within the tolerance of the dtype; the expected ones were computed in fp32."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        one, other = one.detach().float(), other.detach().float()
        worst = float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))
        assert worst <= factor * TOLERANCE[dtype], worst


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies in fp32 to compute the expected with."""
    return [t.detach().float().requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [128, 1024, 4096, 8192, 16_384])
def test_norms(width: int, dtype: torch.dtype) -> None:
    x, residual = normal(1, 777, width, dtype=dtype), normal(1, 777, width, dtype=dtype)
    weight = normal(width, dtype=dtype)
    up, up_sum = (torch.randn(1, 777, width, device=GPU).to(dtype) for _ in range(2))
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    x32, residual32, weight32 = wide(x, residual, weight)
    sum32 = x32 + residual32
    y32 = reference_rms_norm(sum32, weight32, 1e-5)
    agree((y, total), (y32, sum32), dtype)
    agree(
        torch.autograd.grad((y, total), (x, residual, weight), (up, up_sum)),
        torch.autograd.grad((y32, sum32), (x32, residual32, weight32), (up.float(), up_sum.float())),
        dtype,
        2,
    )
    plain, plain32 = rms_norm(x, weight, 1e-5), reference_rms_norm(x32, weight32, 1e-5)
    agree((plain,), (plain32,), dtype)
    agree(
        torch.autograd.grad(plain, (x, weight), up),
        torch.autograd.grad(plain32, (x32, weight32), up.float()),
        dtype,
        2,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gated_unit(kind: str, dtype: torch.dtype) -> None:
    gate, up = normal(513, 14_336, dtype=dtype), normal(513, 14_336, dtype=dtype)
    upstream = torch.randn(513, 14_336, device=GPU).to(dtype)
    found = gated(gate, up, kind)
    gate32, up32 = wide(gate, up)
    expected = reference_gated(gate32, up32, kind)
    agree((found,), (expected,), dtype)
    agree(
        torch.autograd.grad(found, (gate, up), upstream),
        torch.autograd.grad(expected, (gate32, up32), upstream.float()),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 128), (9, 3, 64), (24, 8, 96)])
def test_rotary(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    q = normal(1, 1025, heads, size, dtype=dtype).transpose(1, 2)
    k = normal(1, 1025, kv_heads, size, dtype=dtype).transpose(1, 2)
    angle = torch.rand(1, 1025, size // 2, device=GPU).repeat(1, 1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    upstream = [torch.randn_like(t) for t in (q, k)]
    found = rotary(q, k, cos, sin)
    q32, k32 = wide(q, k)
    expected = reference_rotary(q32, k32, cos.float(), sin.float())
    agree(found, expected, dtype)
    agree(
        torch.autograd.grad(found, (q, k), upstream),
        torch.autograd.grad(expected, (q32, k32), [t.float() for t in upstream]),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "softcap"), [(151_936, None), (128_256, None), (50_257, 30.0)])
def test_cross_entropy(vocabulary: int, softcap: float | None, dtype: torch.dtype) -> None:
    logits = normal(67, vocabulary, dtype=dtype, grad=False).mul_(3)
    target = torch.randint(vocabulary, (67,), device=GPU)
    target[::2] = logits[::2].argmax(-1)
    (leaf,) = wide(logits.requires_grad_())
    logp, correct = reference_cross_entropy(leaf, target, 1.0, softcap)
    (gradient,) = torch.autograd.grad(-logp.sum(), leaf)
    logits = logits.detach()
    found, hits = cross_entropy_(logits, target, None, 1.0, softcap)
    agree((found, logits), (logp, gradient), dtype)
    assert torch.equal(hits, correct)


def test_logits_of_more_elements_than_32_bits_count() -> None:
    """16,384 rows of 151,936 in bf16: 4.6 GiB, the last rows of which lie behind 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    rows, vocabulary = 16_384, 151_936
    logits = torch.empty(rows, vocabulary, device=GPU, dtype=torch.bfloat16)
    logits.normal_()
    last = logits[-3:].clone()
    target = torch.randint(vocabulary, (rows,), device=GPU)
    logp, _, gradient = *reference_cross_entropy(last, target[-3:]), logits[-3:]
    found, _ = cross_entropy_(logits, target, None)
    agree((found[-3:],), (logp,), torch.float32)
    agree((gradient.float().sum(-1) + 1,), (torch.ones(3, device=GPU),), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_log_probs_of_labels(trained: bool, dtype: torch.dtype) -> None:
    """Several chunks; the head frozen, and trained with the gradient of the loss formed in the forward pass."""
    hidden = normal(400, 256, dtype=dtype)
    head = normal(151_936, 256, dtype=dtype, grad=False).mul_(0.1).requires_grad_(trained)
    target = torch.randint(151_936, (400,), device=GPU)
    weight = torch.rand(400, device=GPU)
    logp, _ = linear_logps(hidden, target, head, loss_weight_N=weight if trained else None)
    hidden32, head32 = wide(hidden, head)
    expected = reference_logps(hidden32, target, head32)
    agree((logp,), (expected,), dtype)
    wanted = [(hidden, hidden32), (head, head32)][: 1 + trained]
    agree(
        torch.autograd.grad(-(weight * logp).sum(), [one for one, _ in wanted]),
        torch.autograd.grad(-(weight * expected).sum(), [other for _, other in wanted]),
        dtype,
        2,
    )


def _linears(inputs: int, outputs: list[int], dtype: torch.dtype) -> tuple[list[Linear], list[Linear]]:
    """Layers with adapters in fp32 as the kernels take them, and the same in fp32 throughout."""
    ours, theirs = [], []
    for width in outputs:
        weight = normal(width, inputs, dtype=dtype, grad=False) * inputs**-0.5
        a, b = normal(16, inputs), normal(width, 16)
        with torch.no_grad():
            a.mul_(inputs**-0.5)
            b.mul_(0.1)
        a32, b32 = (t.detach().clone().requires_grad_() for t in (a, b))
        ours.append(Linear(weight, None, a, b, 2.0))
        theirs.append(Linear(weight.float(), None, a32, b32, 2.0))
    return ours, theirs


def _adapters(layers: list[Linear]) -> list[torch.Tensor]:
    return [t for layer in layers for t in (layer.a, layer.b) if t is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linears(dtype: torch.dtype) -> None:
    ours, theirs = _linears(1024, [2048, 512, 512], dtype)
    x = normal(333, 1024, dtype=dtype)
    (x32,) = wide(x)
    found, expected = lora_linears(x, ours), reference_lora_linears(x32, theirs)
    upstream = [torch.randn_like(out) for out in found]
    agree(found, expected, dtype)
    agree(
        torch.autograd.grad(found, [x, *_adapters(ours)], upstream),
        torch.autograd.grad(expected, [x32, *_adapters(theirs)], [t.float() for t in upstream]),
        dtype,
        2,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_mlp(dtype: torch.dtype) -> None:
    ours, theirs = _linears(1024, [3072, 3072], dtype)
    down, down32 = _linears(3072, [1024], dtype)
    x = normal(333, 1024, dtype=dtype)
    (x32,) = wide(x)
    found = gated_mlp(x, ours, down[0], "silu")
    expected = reference_gated_mlp(x32, theirs, down32[0], "silu")
    upstream = torch.randn_like(found)
    agree((found,), (expected,), dtype)
    agree(
        torch.autograd.grad(found, [x, *_adapters([*ours, *down])], upstream),
        torch.autograd.grad(expected, [x32, *_adapters([*theirs, *down32])], upstream.float()),
        dtype,
        2,
    )


TREE = ((700, 210, 330, 5, 64), (-1, 0, 0, -1, 3))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 128), (9, 3, 64), (4, 4, 256)])
@pytest.mark.parametrize("parents", [TREE[1], None])
def test_attention_by_document(
    parents: tuple[int, ...] | None, heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    """The variable-length kernel in bf16 against one exact call per branch in fp32: outputs and gradients."""
    layout, total = layout_of(TREE[0], parents), sum(TREE[0])
    inputs = [
        normal(1, total, n, size, dtype=torch.bfloat16).transpose(1, 2) for n in (heads, kv_heads, kv_heads)
    ]
    assert varlen_attention.takes(inputs[0], inputs[2]), "this torch's varlen_attn is not used"
    upstream = torch.randn(1, heads, total, size, device=GPU)
    found = varlen_attention.varlen_attention(*inputs, layout, window=window, scaling=None)
    wider = wide(*inputs)
    expected = attention.attend_branches(
        *wider, layout, window=window, scaling=None, softcap=None, sinks=None
    )
    agree((found,), (expected,), torch.bfloat16)
    agree(
        torch.autograd.grad(found, inputs, upstream.bfloat16()),
        torch.autograd.grad(expected, wider, upstream.bfloat16().float()),
        torch.bfloat16,
        2,
    )


def test_attention_makes_no_host_wait() -> None:
    """The layout of a pass goes to the device without one, and so does everything after it."""
    inputs = [normal(1, 256, n, 64, dtype=torch.bfloat16).transpose(1, 2) for n in (8, 2, 2)]
    layouts = [layout_of((100, 100 + n, 56 - n), (-1, 0, 0)) for n in range(3)]
    attention.attention(torch.nn.Module(), *inputs, None, document_lengths=layouts[0].queries)  # is tried
    varlen_attention.varlen_attention(*inputs, layouts[0], window=None, scaling=None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layout in layouts[1:]:
            out = varlen_attention.varlen_attention(*inputs, layout, window=None, scaling=None)
            torch.autograd.grad(out.sum(), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
