"""On a GPU: CUDA graphs of the engine's steps against its ordinary passes, and what becomes of captures that fail."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.generate import graphs
from luthier.generate.continuous import Continuous
from luthier.generate.engine import Engine, why_not_continuous
from luthier.generate.rows import Row
from luthier.generate.sampling import Sampling
from luthier.models import attention
from luthier.models.several import open_several
from tests.generate.test_continuous import some_prompts
from tests.models.families import toy_model
from tests.models.toy_folders import adapter_folder, base_folder

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _captured_early(monkeypatch: pytest.MonkeyPatch) -> None:
    attention.register()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(graphs, "CAPTURE_AT", 2)
    monkeypatch.setattr(graphs, "LEAST_KEYS", 16)


def on_gpu(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = toy_model(family)
    model.to(GPU, dtype)
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention.NAME)
    assert not why_not_continuous(model)
    return model


def rows_of(model: Any) -> list[Row]:
    engine = Engine(model, None, [])
    return [
        row
        for prompt, limit in zip(some_prompts((5, 9, 3, 40, 11, 6)), (24, 12, 60, 13, 16, 30), strict=True)
        for row in engine.rows([prompt], Sampling(max_new_tokens=limit, do_sample=False))
    ]


def answers(loop: Any, rows: list[Row], captured: bool = True) -> list[list[int]]:
    if not captured:
        loop.graphs = None
    loop.submit(rows[:3])
    for _ in range(8):
        loop.step()
    loop.submit(rows[3:])
    while loop.step():
        pass
    return [row.token_ids for row in rows]


def both_ways(model: Any) -> tuple[list[list[int]], list[list[int]]]:
    with_graphs = answers(Continuous(model, max_cached_tokens=4096), rows_of(model))
    return with_graphs, answers(Continuous(model, max_cached_tokens=4096), rows_of(model), captured=False)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "smollm3", "gpt2", "opt"])
def test_replayed_steps_write_what_ordinary_ones_do(family: str) -> None:
    model = on_gpu(family)
    found, expected = both_ways(model)
    assert found == expected
    state = graphs.state_of(model)
    assert not state.why_off
    assert state.captured >= 4 and state.replayed > 20


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_experts_are_captured_or_left_alone(family: str) -> None:
    """Which of the two depends on how transformers runs them."""
    model = on_gpu(family)
    found, expected = both_ways(model)
    assert found == expected
    assert bool(graphs.state_of(model).why_off) != bool(graphs.state_of(model).captured)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype: torch.dtype) -> None:
    """Near ties may fall another way; each capture is compared with an ordinary pass as it is."""
    model = on_gpu("llama", dtype)
    found, _ = both_ways(model)
    assert [len(ids) for ids in found] == [24, 12, 60, 13, 16, 30]
    state = graphs.state_of(model)
    assert not state.why_off and state.captured >= 4 and state.replayed > 20


def test_several_adapters(tmp_path: Path, toy_tokenizer: Any) -> None:
    base = base_folder(tmp_path / "base", "llama", toy_tokenizer)
    settings: tuple[dict[str, Any], ...] = (
        dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"]),
        dict(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj", "up_proj", "lm_head"]),
    )
    paths = [adapter_folder(tmp_path / f"run-{n}", base, n, **each) for n, each in enumerate(settings)]
    several = open_several([str(path) for path in (*paths, base)], device=GPU, dtype=torch.float32)

    def answered(captured: bool) -> list[list[int]]:
        rows = rows_of(several.model)
        for row, name in zip(rows, ("run-0", "base", "run-1", "run-0", "run-1", "run-0"), strict=True):
            row.adapter = several.adapter_of(name)
        return answers(several.loop(Engine(several.model, several.tokenizer, [])), rows, captured)

    assert answered(True) == answered(False)
    state = graphs.state_of(several.model)
    assert not state.why_off and state.replayed > 20


@pytest.mark.parametrize("when", ["always", "in a capture", "never, but a capture fails"])
def test_a_capture_that_fails_harms_nothing(when: str) -> None:
    """A layer that waits for the device, whether that is noticed before or breaks the capture, and one that raises."""
    model, other = on_gpu("llama"), on_gpu("llama")

    def hook(module: Any, args: Any, out: Any) -> None:
        capturing = torch.cuda.is_current_stream_capturing()
        if when == "always" or (when == "in a capture" and capturing):
            (out[0] if isinstance(out, tuple) else out).sum().item()
        elif when.startswith("never") and capturing:
            raise ValueError("not now")

    hooked = model.model.layers[0].register_forward_hook(hook)
    before = torch.cuda.current_stream()
    found, expected = both_ways(model)
    hooked.remove()
    assert found == expected
    assert graphs.state_of(model).why_off and not graphs.state_of(model).captured
    assert ("waits for the device" in graphs.state_of(model).why_off) == (when == "always")
    assert torch.cuda.current_stream() == before
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    found, expected = both_ways(other)
    assert found == expected
    assert graphs.state_of(other).replayed and not graphs.state_of(other).why_off


def test_memory_is_given_back() -> None:
    model = on_gpu("llama")
    loop = Continuous(model, max_cached_tokens=4096)
    answers(loop, rows_of(model))  # what the process keeps for good: workspaces
    reserved = []
    for _ in range(3):
        answers(loop, rows_of(model))
        loop.clear()
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert graphs.state_of(model).captured > 8
    assert reserved[0] == reserved[2], reserved
