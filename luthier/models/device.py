"""Where to compute, and in which precision.

`auto` asks what the device multiplies fast, not what it can represent: a CPU without matrix units for bf16
is several hundred times slower in it than in fp32, and a GPU before Ampere has fp16 only.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform

import torch

from luthier.config import Config
from luthier.errors import ConfigError
from luthier.models.load import read_model_config

log = logging.getLogger("luthier")

# Of glibc's malloc.h: blocks from which on memory is mapped by itself, and free memory at the top of the heap that
# is kept.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# Hidden size from which `auto` computes in bf16 on a CPU that has matrix units for it.
WIDE = 512


def choose_device(device_map: object) -> torch.device:
    """The device of a run; `device_map` as in the config: None or "auto" takes the best one there is.

    Raises:
        ConfigError: a device that this machine lacks.
    """
    if isinstance(device_map, dict):  # transformers' spelling of one device for everything
        device_map = device_map[""]
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    if device_map in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(str(device_map))
    except RuntimeError as error:
        raise ConfigError(
            f"device_map: {device_map!r} is no device (cpu, cuda, cuda:1, mps or auto)"
        ) from error
    missing = (
        (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count())
        or (device.type == "mps" and not torch.backends.mps.is_available())
        or device.type not in ("cpu", "cuda", "mps")
    )
    if missing:
        raise ConfigError(
            f"device_map: {device_map}: this machine has no such device; `luthier doctor` lists them"
        )
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device has matrix units for bf16 (Ampere and later; CPUs with AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(supported and supported())
    return False


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The compute dtype for a config on a device. What the device cannot do well is changed, and said."""
    precision = config.precision
    fast_bf16 = bf16_is_fast(device)
    if precision.fp16 is True:
        if device.type == "cpu":
            log.warning("fp16: true: a CPU computes in fp16 far too slowly; training in fp32 instead")
            return torch.float32
        return torch.float16
    if precision.bf16 is True:
        if fast_bf16:
            return torch.bfloat16
        instead = torch.float16 if device.type == "cuda" else torch.float32
        log.warning("bf16: true: %s has no fast bf16; training in %s instead", device, str(instead)[6:])
        return instead
    if precision.bf16 == "auto" or precision.fp16 == "auto":
        if fast_bf16 and (device.type != "cpu" or _is_wide(config)):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    return torch.float32


def _is_wide(config: Config) -> bool:
    """Whether a model's multiplies are large enough for a CPU's matrix units. Every new number of tokens costs them
    some ms of preparation, and memory: at width 128 fp32 is 3 times as fast and at 256 the same, at 576 bf16 gains
    7% (passes of 500 to 1,000 tokens on two cores of a Xeon with AMX)."""
    described = read_model_config(config.model)
    return int(getattr(described.get_text_config(decoder=True), "hidden_size", None) or 0) >= WIDE


def set_matmul_precision(config: Config, device: torch.device) -> None:
    """TF32 for fp32 multiplies on CUDA (`tf32: auto` turns it on where the card has it), and determinism."""
    if config.precision.deterministic:
        # cuBLAS reads it when it starts, which is at the first multiplication
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if device.type != "cuda":
        if config.precision.tf32 is True:
            log.warning("tf32: true: %s has no TF32; ignored", device)
        return
    allowed = config.precision.tf32 is True or config.precision.tf32 == "auto"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def keep_freed_memory(device: torch.device) -> None:
    """Let the process keep what it frees, on a CPU under glibc.

    A step frees and takes the same large tensors over and over. glibc gives each back to the system, which hands
    it out again page by page, each zeroed: a fifth of a training step of a 135M model (measured). The peak is the
    same, since what was freed is what is taken next.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    largest = 2**31 - 1  # the settings are C ints
    libc = ctypes.CDLL(None)
    for setting in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        libc.mallopt(setting, largest)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: the allocator's on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
