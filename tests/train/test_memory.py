"""Tokens per pass: where the number comes from, and how a run goes on that runs out of memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.config import Config
from luthier.errors import RunError
from luthier.models import memory
from luthier.models.memory import CPU_TOKENS, activation_bytes, choose_budget
from luthier.train import checkpoint, run
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


class _Fails(torch.autograd.Function):
    """Passes a tensor on; raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _small_device(monkeypatch: pytest.MonkeyPatch, limit: int, *, where: str, since: int = 0) -> list[int]:
    """From a number of passes on, passes of more tokens than the limit find no memory. Returns the passes' tokens."""
    build = run.build_policy
    seen: list[int] = []

    def built(*arguments: Any, **options: Any) -> torch.nn.Module:
        policy = build(*arguments, **options)
        forward = policy.forward

        def limited(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = len(batch.input_ids)
            if not policy.training:
                return forward(batch)
            seen.append(tokens)
            full = tokens > limit and len(seen) > since
            if full and where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if full and where == "cpu":
                raise RuntimeError(
                    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."
                )
            logps, hits = forward(batch)
            return (_Fails.apply(logps) if full else logps), hits

        policy.forward = limited
        return policy

    monkeypatch.setattr(run, "build_policy", built)
    return seen


@pytest.mark.parametrize("where", ["forward", "backward", "cpu"])
def test_out_of_memory_the_step_is_repeated_in_smaller_passes(
    run_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """The third step fails in a pass that is not its first; the run is the one that began with less."""
    values = dict(
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        max_tokens_per_pass=400,
        lora_dropout=0.1,
        save_steps=2,
        share_prefixes="off",
        val_set_size=4,
        eval_steps=3,
    )
    small = run_config(**{**values, "max_tokens_per_pass": 200}, output_dir=str(tmp_path / "small"))
    train(small)
    with monkeypatch.context() as patch:
        seen = _small_device(patch, 250, where=where, since=5)
        result = train(run_config(**values))
    said = capsys.readouterr().err
    assert said.count("out of memory at step") == 1 and "going on with" in said
    assert max(seen[:5]) > 250 and max(seen[-5:]) <= 250
    budget = result.state.tokens_per_pass
    assert budget < 250 and f"going on with {budget}" in said
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "small"), atol=2e-6)
    ours, theirs = (checkpoint.read_masters(tmp_path / f / "checkpoint-6") for f in ("run", "small"))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)

    # What it learned is in the checkpoint: a resumed run does not run out again, and is the same to the bit.
    expected = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    with monkeypatch.context() as patch:
        seen = _small_device(patch, 250, where=where)
        again = train(run_config(**values, resume_from_checkpoint="auto"))
    assert max(seen) <= budget and again.state.tokens_per_pass == budget
    assert losses(tmp_path / "run") == expected
    # unless the config says otherwise
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    other = {**values, "max_tokens_per_pass": 300}
    assert train(run_config(**other, resume_from_checkpoint="auto")).state.tokens_per_pass == 300


def test_a_document_that_memory_does_not_hold_ends_the_run(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_device(monkeypatch, 60, where="forward")
    with pytest.raises(RunError, match=r"out of memory at step 1 .*one document.*gradient_checkpointing"):
        train(run_config())


def test_sixteen_bit_gradients_of_a_pass_that_failed_are_gone(
    run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "choose_dtype", lambda config, device: torch.bfloat16)
    values = dict(adapter=None, lora_r=None, learning_rate=1e-3, max_steps=2, share_prefixes="off")
    train(run_config(**values, max_tokens_per_pass=70, output_dir=str(tmp_path / "small")))
    _small_device(monkeypatch, 170, where="backward")
    train(run_config(**values, max_tokens_per_pass=300))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "small"), atol=5e-2)


def test_auto_is_at_most_a_step_and_is_said_and_kept(
    run_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    result = train(run_config(max_steps=1, gradient_accumulation_steps=1))
    lengths = [
        int(n) for n in caplog.text.split("passes of up to ")[1].split(" ")[0].replace(",", "").split()
    ]
    assert lengths == [result.state.tokens_per_pass]
    assert "(a whole step needs no more)" in caplog.text
    state, _ = checkpoint.read_state(tmp_path / "run" / "checkpoint-1")
    assert state.tokens_per_pass == lengths[0] and state.tokens_asked == "auto"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["tokens_per_pass"] == lengths[0]


def test_bounds_of_auto(toy_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_llama_dir)
    trained = sum(p.numel() for p in model.parameters())

    def budget(free: int, *, longest: int = 100, step: int = 10**9, device: torch.device = CPU) -> int:
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        chosen = choose_budget(model, device, longest=longest, step_tokens=step, run_pass=lambda: 1)
        return chosen.tokens

    plenty = 2**50
    assert budget(plenty) == CPU_TOKENS
    assert budget(plenty, step=300) == 300
    assert budget(plenty, longest=10_000) == 10_000
    assert budget(0) == 100
    some = memory._OPTIMIZER_BYTES * trained + 2 * 500 * activation_bytes(model)
    assert budget(some) == 500
    assert budget(some, device=torch.device("mps")) == 500
    assert budget(plenty, step=10**6, device=torch.device("mps")) == 10**6


def test_on_cuda_a_pass_is_measured(toy_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_llama_dir)
    trained = memory._OPTIMIZER_BYTES * sum(p.numel() for p in model.parameters())
    used = SimpleNamespace(now=1000, peak=1000)

    def run_pass() -> int:
        used.peak = used.now + 64 * 1_000_000
        return 64

    def no_room() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name, value in {
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: used.now,
        "max_memory_allocated": lambda device: used.peak,
        "memory_reserved": lambda device: used.now + 100 * 10**6,
        "mem_get_info": lambda device: (trained + 900 * 10**6, 10**12),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    device = torch.device("cuda")
    chosen = choose_budget(model, device, longest=10, step_tokens=10**6, run_pass=run_pass)
    assert chosen.tokens == 850 and "measured" in chosen.why
    assert choose_budget(model, device, longest=10, step_tokens=10**6, run_pass=no_room).tokens == 10


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_limits_of_control_groups(tmp_path: Path, kind: str) -> None:
    """The tightest of the group's own and its parents' limits; cached files count as free."""
    base, files = (tmp_path, ("memory.max", "memory.current", "inactive_file"))
    if kind == "v1":
        base = tmp_path / "memory"
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder, limit, used in [(base / "pod", "1000", "700"), (base / "pod" / "job", "max", "600")]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files[0]).write_text(limit + "\n")
        (folder / files[1]).write_text(used)
        (folder / "memory.stat").write_text(f"anon 5\n{files[2]} 50\n")
    (tmp_path / "cgroup").write_text(
        "3:cpuset:/x\n" + ("4:memory:/pod/job" if kind == "v1" else "0::/pod/job")
    )
    assert memory._container_memory(tmp_path / "cgroup", tmp_path) == [350]
    assert memory._container_memory(tmp_path / "nowhere", tmp_path) == []
    assert 0 < memory.free_memory(CPU) < 2**50


def test_activations_are_estimated_within_a_factor_of_two(toy_llama_dir: Path) -> None:
    """Against the tensors that autograd keeps; with checkpointing it is far less."""
    model = AutoModelForCausalLM.from_pretrained(toy_llama_dir)
    ids = torch.randint(model.config.vocab_size, (1, 256))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.get_decoder()(input_ids=ids, use_cache=False)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = sum(size for place, size in kept.items() if place not in weights) / ids.numel()
    assert out.last_hidden_state.requires_grad
    assert 0.5 < activation_bytes(model) / seen < 2
    model.gradient_checkpointing_enable()
    assert activation_bytes(model) < seen
