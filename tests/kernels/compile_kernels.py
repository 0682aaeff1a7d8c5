"""Compiles every Triton kernel for an H100, which needs no GPU: run by `test_triton_compiles.py` in a process
of its own, since Triton cannot both interpret and compile.

The ops run as always, on the CPU, with the launch of a kernel replaced by its compilation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from luthier.kernels.backend import backend
from luthier.kernels.cross_entropy import cross_entropy_
from luthier.kernels.gated import KINDS, gated
from luthier.kernels.rms_norm import add_rms_norm, rms_norm
from luthier.kernels.rotary import rotary

POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.bool: "*i1"}


def compile_instead(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> None:
    values = dict(zip(self.arg_names, args, strict=False)) | keywords
    signature, constants = {}, {}
    for parameter in self.params:
        value = values.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[(parameter.num,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTER[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(self, signature, constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=values)
    print(f"{self.__module__.rpartition('.')[2]}.{self.__name__}")


def main() -> None:
    JITFunction.run = compile_instead

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

    x, weight = tensor(2, 4096), tensor(4096)
    torch.autograd.backward(add_rms_norm(x, x, weight.detach(), 1e-6, cast_before_weight=True), (x, x))
    rms_norm(tensor(1, 2, 3, 64), tensor(64), 1e-6).sum().backward()
    for kind in KINDS:
        gated(tensor(2, 128), tensor(2, 128), kind).sum().backward()
    cos = torch.zeros(1, 5, 64)
    q, k = rotary(tensor(1, 9, 5, 64), tensor(1, 3, 5, 64), cos, cos)
    (q.sum() + k.sum()).backward()
    target, share = torch.zeros(3, dtype=torch.long), torch.zeros(3)
    cross_entropy_(tensor(3, 50_000).detach(), target, share, 1.0, 30.0)
    cross_entropy_(torch.zeros(3, 50_000), target, None)


if __name__ == "__main__":
    with backend("triton"):
        main()
