"""The norm's Triton kernels: a program holds a tile of whole rows, so that each row is read once and written once.

Narrow rows (the heads of a query or key norm) share a program. The weight's gradient is summed over the rows of
a program and then over the programs, of which there are a few per multiprocessor in that case.

Shapes: T rows, D features.
"""

# A kernel's arguments have the types of each call.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

# fp32 values in a program's tile, below which several rows share it.
TILE = 2048
# Programs that sum the weight's gradient, per multiprocessor.
PROGRAMS_PER_PROCESSOR = 4


# T changes from step to step: not to be compiled anew for multiples of 16.
@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, total_ptr, y_ptr, rstd_ptr,
    x_stride, residual_stride, T, D, eps, offset,
    ADD: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < T)[:, None] & (column < D)[None, :]
    dense = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask, other=0.0)
        # Rounded as it is stored: backward normalises what it reads.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + dense, x, mask)
    x = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + row, rstd, row < T)
    weight = tl.load(weight_ptr + column, column < D, other=0.0).to(tl.float32) + offset
    normed = x * rstd[:, None]
    if CAST_BEFORE_WEIGHT:
        normed = normed.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + dense, (normed * weight[None, :]).to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dtotal_ptr, dx_ptr, dweight_ptr,
    dy_stride, x_stride, dtotal_stride, T, D, offset,
    ADD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, column < D, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < T)[:, None] & (column < D)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < T, other=0.0)[:, None]
        normed = x * rstd
        dnormed = dy * weight[None, :]
        mean = tl.sum(dnormed * normed, axis=1) / D
        dx = (dnormed - normed * mean[:, None]) * rstd
        if ADD:
            dtotal = tl.load(dtotal_ptr + row[:, None] * dtotal_stride + column[None, :], mask, other=0.0)
            dx += dtotal.to(tl.float32)
        tl.store(dx_ptr + row[:, None] * D + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask)
        if WEIGHT_GRAD:
            dweight += tl.sum(dy * normed, axis=0)
    if WEIGHT_GRAD:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + column, dweight, column < D)


def forward(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float, cast_before_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_TD, contiguous, and rstd_T1."""
    x_TD = _with_dense_rows(x_TD)
    y, rstd = _new(x_TD), _new_rstd(x_TD)
    _launch_forward(x_TD, None, weight_D, None, y, rstd, eps, offset, cast_before_weight)
    return y, rstd


def add_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y and x + residual, contiguous and of x's shape, and rstd_T1."""
    x_TD = _with_dense_rows(x.reshape(-1, x.shape[-1]))
    residual_TD = _with_dense_rows(residual.reshape(x_TD.shape))
    y, total, rstd = _new(x_TD), _new(x_TD), _new_rstd(x_TD)
    _launch_forward(x_TD, residual_TD, weight_D, total, y, rstd, eps, offset, cast_before_weight)
    return y.view(x.shape), total.view(x.shape), rstd


def backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T1: torch.Tensor,
    offset: float,
    dtotal_TD: torch.Tensor | None,
    *,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx_TD, with dtotal added where given, and dweight_D where wanted."""
    (T, D), dx = x_TD.shape, _new(x_TD)
    rows, block, warps = _tile(D)
    programs = triton.cdiv(T, rows)
    if weight_grad:
        programs = min(programs, PROGRAMS_PER_PROCESSOR * _processors(x_TD))
    # Each program's sum; not touched without a weight gradient.
    sums = torch.empty((programs, D) if weight_grad else 0, dtype=torch.float32, device=x_TD.device)
    x_TD, dy_TD = _with_dense_rows(x_TD), _with_dense_rows(dy_TD)
    dtotal = dy_TD if dtotal_TD is None else _with_dense_rows(dtotal_TD)
    if T:
        with torch.cuda.device_of(x_TD):
            _backward_kernel[(programs,)](
                dy_TD, x_TD, weight_D.contiguous(), rstd_T1, dtotal, dx, sums,
                dy_TD.stride(0), x_TD.stride(0), dtotal.stride(0), T, D, offset,
                ADD=dtotal_TD is not None, WEIGHT_GRAD=weight_grad, ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return dx, sums.sum(0).to(weight_D.dtype) if weight_grad else None


def _launch_forward(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    total_TD: torch.Tensor | None,
    y_TD: torch.Tensor,
    rstd_T1: torch.Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
) -> None:
    T, D = x_TD.shape
    if T == 0:
        return
    rows, block, warps = _tile(D)
    residual = x_TD if residual_TD is None else residual_TD
    with torch.cuda.device_of(x_TD):
        _forward_kernel[(triton.cdiv(T, rows),)](
            x_TD, residual, weight_D.contiguous(), y_TD if total_TD is None else total_TD, y_TD, rstd_T1,
            x_TD.stride(0), residual.stride(0), T, D, eps, offset,
            ADD=residual_TD is not None, CAST_BEFORE_WEIGHT=cast_before_weight,
            ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def _tile(D: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    block = triton.next_power_of_2(D)
    rows = max(1, TILE // block)
    return rows, block, min(16, max(4, block // 512))


def _with_dense_rows(x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()


def _new(x_TD: torch.Tensor) -> torch.Tensor:
    return torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)


def _new_rstd(x_TD: torch.Tensor) -> torch.Tensor:
    return torch.empty((x_TD.shape[0], 1), dtype=torch.float32, device=x_TD.device)


def _processors(x: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
