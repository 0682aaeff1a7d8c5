"""Frozen weights in 8-bit floating point, on cards that multiply in it (Hopper and later).

It changes the numbers, unlike any other fast path here. So it is asked for, and then proven on the run's own first
pass: the loss and the adapter's gradients before the weights are rounded, against those after. Layers are rounded
one by one, so that no second copy of the model is ever held.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from luthier.errors import ConfigError, RunError
from luthier.kernels.fp8_linear import MULTIPLE
from luthier.models.frozen import FrozenLinear
from luthier.models.load import decoder_of
from luthier.models.lora import lora_layers
from luthier.models.policy import FlatBatch, Policy

log = logging.getLogger("luthier")

# What rounding may do to a pass: the loss moves by this share at most, and the gradients keep this cosine.
LOSS_TOLERANCE, COSINE = 0.02, 0.97


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Whether this device multiplies in e4m3 with a scale for each row, and gives what the run computes in.

    Raises:
        ConfigError: it does not.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(
            f"load_in_fp8: {name} has no 8-bit floating-point multiply with a scale for each row (Hopper, such as the "
            "H100, and later have): leave load_in_fp8 out, or take load_in_8bit or load_in_4bit to save memory"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"load_in_fp8 gives bf16, and this run computes in {str(dtype)[6:]}: set `bf16: true`"
        )


def round_to_fp8(policy: Policy, batch: FlatBatch) -> None:
    """Round the decoder's frozen linear weights to e4m3 and see that a pass stays what it was.

    Args:
        batch: what to see it on; the run's first pass.

    Raises:
        RunError: the loss or the gradients moved further than `LOSS_TOLERANCE` and `COSINE` allow.
    """
    loss, gradients = _pass(policy, batch)
    decoder = decoder_of(policy.model)
    rounded, left = 0, 0
    for name, module in list(decoder.named_modules()):
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module = FrozenLinear(module).train(module.training)
            decoder.set_submodule(name, module)
        if not isinstance(module, FrozenLinear) or module.storage != "dense":
            continue
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            left += 1
            continue
        module.to_fp8()
        rounded += 1
    found_loss, found = _pass(policy, batch)
    moved = abs(found_loss - loss) / max(abs(loss), 1e-6)
    cosine = float(torch.nn.functional.cosine_similarity(found, gradients, dim=0))
    what = (
        f"the loss of the first pass moves from {loss:.4f} to {found_loss:.4f}, "
        f"the cosine of its gradients with those before is {cosine:.4f}"
    )
    if not (moved <= LOSS_TOLERANCE and cosine >= COSINE):
        raise RunError(f"load_in_fp8: this model does not bear it: {what}; leave load_in_fp8 out")
    log.info("%d linear layers in fp8%s: %s", rounded, f", {left} kept for their size" if left else "", what)


def _pass(policy: Policy, batch: FlatBatch) -> tuple[float, torch.Tensor]:
    """Mean loss of the batch's labels, and all gradients in one vector. B is 0 in a new adapter, which hides
    what reaches A: it is random here, and put back."""
    layers = list(lora_layers(policy.model).values())
    before = [layer.lora_B.detach().clone() for layer in layers]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.add_(0.01 * torch.randn(layer.lora_B.shape, generator=generator).to(layer.lora_B))
    policy.train()
    logps, _ = policy(batch)
    loss = -(logps * batch.weight_N).sum() / batch.weight_N.sum()
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    with torch.no_grad():
        for layer, values in zip(layers, before, strict=True):
            layer.lora_B.copy_(values)
    return float(loss.detach()), torch.cat([g.flatten().float() for g in gradients if g is not None])
