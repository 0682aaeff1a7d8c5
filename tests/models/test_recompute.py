"""Recomputation: the same numbers in every mode, less kept in each than in the one before, and a choice that takes
no more than memory asks for."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.config import Config
from luthier.errors import ConfigError, ModelError, RunError
from luthier.kernels.tiled_mlp import tiled_mlp
from luthier.models import fuse, memory
from luthier.models.fused import FusedMLP
from luthier.models.kept import Allocations, Growth, Kept, count
from luthier.models.layers import Recomputation
from luthier.models.load import use_flat_attention
from luthier.models.lora import add_lora
from luthier.models.policy import Policy
from luthier.models.recompute import MODES, Copies, Host, Mode, recomputed
from luthier.train import checkpoint, run
from luthier.train.run import train
from tests.models.test_fuse import Batch, adapted, assert_same, logps_and_gradients, plain
from tests.train.conftest import (  # noqa: F401 -- fixtures
    losses,
    rows_file,
    run_config,
)

MakeConfig = Callable[..., Config]


class Tree(Batch):
    """A forest of three documents that share beginnings; see `models.isolation`."""

    lengths = drawn = (8, 7, 9, 4, 11)  # type: ignore[assignment]
    parents = (-1, 0, 1, 1, 0)  # type: ignore[assignment]
    seeds = (1, 2, 3, 4, 5)  # type: ignore[assignment]
    cu_seqlens = torch.tensor([0, 8, 15, 24, 28, 39], dtype=torch.int32)
    position_ids = torch.cat([torch.arange(a, a + n) for a, n in zip((0, 8, 15, 15, 8), lengths, strict=True)])
    input_ids = torch.randint(3, 128, (39,), generator=torch.Generator().manual_seed(0))
    position_N = torch.tensor([6, 12, 20, 22, 25, 33, 37])


def run_pass(policy: Policy, batch: Any = Batch) -> Any:
    if batch is Batch:
        return logps_and_gradients(policy)
    policy.train()
    policy.zero_grad(set_to_none=True)
    logps, _ = policy(batch())
    (logps * batch.weight_N * torch.linspace(0.5, 2.0, 7)).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def assert_same_bits(found: Any, expected: Any) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize(
    ("family", "settings", "batch"),
    [
        ("llama", {"lora_dropout": 0.3}, Batch),
        ("llama", {"lora_target_modules": ["q_proj", "v_proj"]}, Batch),
        ("llama", {"adapter": None}, Tree),
        ("qwen3", {}, Tree),
        ("gemma2", {"lora_dropout": 0.2}, Batch),
        ("gemma2", {"adapter": None}, Tree),
        ("granite", {}, Batch),
        ("olmo2", {}, Batch),
        ("phi3", {"adapter": None}, Batch),
        ("mixtral", {}, Batch),  # its MLP is not fused
        ("cohere", {}, Tree),  # its layer is not, its MLP is
        ("gpt2", {"adapter": None}, Batch),  # nothing is
    ],
    ids=str,
)
def test_every_mode_has_the_bits_of_keeping_everything(family: str, settings: dict[str, Any], batch: Any) -> None:
    policy = Policy(plain(family)) if "adapter" in settings else Policy(*adapted(family, **settings))
    fuse.fuse_policy(policy)
    expected = run_pass(policy, batch)
    recomputation = Recomputation(policy.model)
    for mode in MODES:
        recomputation.set_all(mode)
        assert_same_bits(run_pass(policy, batch), expected)
    mixed: list[Mode] = ["layer", "norms"]
    recomputation.set(mixed)
    assert_same_bits(run_pass(policy, batch), expected)
    recomputation.set_all("keep")
    policy.eval()
    with torch.no_grad():  # a pass without gradients is left alone
        recomputation.set_all("layer")
        assert torch.equal(policy(batch())[0], policy(batch())[0])


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.3}, {"adapter": None}, {}], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_tiles_add_up_to_the_whole(family: str, settings: dict[str, Any]) -> None:
    policy = Policy(plain(family)) if "adapter" in settings else Policy(*adapted(family, **settings))
    fuse.fuse_policy(policy)
    expected = logps_and_gradients(policy)
    recomputation = Recomputation(policy.model, tiled=True)
    for tile in (1, 5, 16):
        recomputation.tile = tile
        for mode in MODES[:4]:
            recomputation.set_all(mode)
            assert_same(logps_and_gradients(policy), expected)


def test_tiles_are_bounded_and_a_tile_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wide tensor has more rows than a tile, forward and backward."""
    from luthier.kernels import tiled_mlp as module

    seen: list[int] = []
    forward = module.gated_forward

    def note(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        seen.append(len(gate))
        return forward(gate, up, kind)

    monkeypatch.setattr(module, "gated_forward", note)
    policy = Policy(*adapted("llama"))
    fuse.fuse_policy(policy)
    recomputation = Recomputation(policy.model, tiled=True)
    recomputation.tile = 5
    recomputation.set_all("keep")
    logps_and_gradients(policy)
    # 17 tokens in four tiles, and the last layer's seven labelled rows in two; each forward and again in backward
    assert seen == [5, 5, 5, 2, 4, 3, 4, 3, 5, 5, 5, 2]


def wide_policy(adapter: bool, dropout: float = 0.0) -> Policy:
    """Four Llama layers with widths that tell tensors apart."""
    values = dict(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).float()
    use_flat_attention(model)
    state = None
    if adapter:
        asked = {"base_model": "x", "datasets": [{"path": "x", "type": "alpaca"}], "adapter": "lora", "lora_r": 4}
        state = add_lora(model, Config.from_flat({**asked, "lora_dropout": dropout}).adapter, seed=0)
    policy = Policy(model, state)
    fuse.fuse_policy(policy)
    return policy


def traced(policy: Policy, lengths: tuple[int, ...]) -> tuple[int, int]:
    """Bytes that are alive after a forward pass, and the most through forward and backward."""
    policy.train()
    policy.dropout.lengths, policy.dropout.seeds = lengths, tuple(range(len(lengths)))
    tokens = sum(lengths)
    ids = torch.arange(tokens) % 64
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    with Allocations() as trace:
        hidden = policy.hidden(ids, positions, lengths, cu)
        after = trace.alive
        hidden.sum().backward()
    policy.zero_grad(set_to_none=True)
    return after, trace.peak


@pytest.mark.parametrize(
    ("adapter", "dropout"), [(True, 0.0), (True, 0.3), (False, 0.0)], ids=["lora", "dropout", "full"]
)
def test_what_each_mode_keeps(adapter: bool, dropout: float) -> None:
    """Numbers a token in a layer: what the formulas of the modes say, and nothing beside it."""
    hidden, queries, keys, wide, heads, rank = 48, 64, 2 * 32, 176, 4, 4
    policy = wide_policy(adapter, dropout)
    found = count(policy, Recomputation(policy.model, free=True))
    inner = rank * (3 + 1 + 2 + 1) if adapter else 0
    statistics = 2 + heads  # of two norms, and the log-sum of each query
    # inputs and outputs of two norms; queries, keys and values; attention's output, by document and in one
    everything = 4 * hidden + queries + keys + 2 * queries + 2 * wide + inner + statistics
    of_mlp = 2 * wide + (rank * 3 if adapter else 0)
    if dropout:  # masks of the inputs of seven layers, a byte each
        of_mlp += (2 * hidden + wide) / 4
        everything += (5 * hidden + queries + wide) / 4
    expected = {
        "keep": everything,
        "norms": everything - 2 * hidden,
        "mlp": everything - 2 * hidden - of_mlp,
        "layer": hidden,
        "offload": hidden,
    }
    for layer in found.layers:
        assert {mode: growth.token / 4 for mode, growth in layer.items()} == pytest.approx(expected)
        assert all(growth.pair == 0 for growth in layer.values())


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_the_count_is_what_a_longer_pass_takes(adapter: bool) -> None:
    """Counted on passes of 32 to 128 tokens, against the allocations of one with four documents of 256."""
    policy = wide_policy(adapter)
    recomputation = Recomputation(policy.model, free=True)
    found = count(policy, recomputation)
    assert recomputation.modes == ["keep"] * 4 and not any(p.grad is not None for p in policy.parameters())
    lengths, weights = (256,) * 4, 0 if adapter else sum(p.numel() for p in policy.parameters()) * 4
    recomputation.tile = 256
    peaks = []
    chosen: list[list[Mode]] = [[mode] * 4 for mode in MODES[:4]]
    for modes in [*chosen, ["layer", "mlp", "mlp", "norms"]]:
        recomputation.set(modes)  # type: ignore[arg-type]
        _, peak = traced(policy, lengths)
        said = Kept(found.layers, found.beside, found.wide, 256).bytes(modes, 1024, 256)  # type: ignore[arg-type]
        # Gradients of weights are not in the count, and are there in part when the height is reached.
        assert 0.9 * peak - weights < said < 1.1 * peak, modes
        peaks.append(peak)
    assert peaks[3] < 0.65 * peaks[0] and peaks[3] < peaks[2] < peaks[1] <= peaks[0]


def test_attention_with_scores_grows_with_the_square_of_a_document() -> None:
    policy = Policy(*adapted("gemma2"))
    fuse.fuse_policy(policy)
    found = count(policy, Recomputation(policy.model))
    assert all(layer["keep"].pair > 4 * 4 for layer in found.layers)  # four heads, more than one matrix each
    assert all(layer["layer"].pair == 0 for layer in found.layers)


def test_the_least_recomputation_that_fits_is_chosen() -> None:
    sizes: dict[Mode, float] = {"keep": 100, "norms": 80, "mlp": 40, "layer": 10, "offload": 10}
    layer = {mode: Growth(size, 0.0) for mode, size in sizes.items()}
    beside = {mode: Growth(5.0, 0.0) for mode in MODES}
    kept = Kept([layer] * 4, beside, 0, 64)
    assert kept.choose(10, 10, 4050) == ["keep"] * 4
    assert kept.choose(10, 10, 4049) == ["norms", "keep", "keep", "keep"]
    assert kept.choose(10, 10, 3250) == ["norms"] * 4
    assert kept.choose(10, 10, 3000) == ["mlp", "norms", "norms", "norms"]
    assert kept.choose(10, 10, 1000) == ["layer", "layer", "layer", "mlp"]
    assert kept.choose(10, 10, 0) == ["layer"] * 4
    shallow = Kept([layer], {**beside, "layer": Growth(50.0, 0.0)}, 0, 64)  # a second run may need more than it saves
    assert shallow.choose(10, 10, 0) == ["mlp"]
    assert kept.tokens(["keep"] * 4, 10, 8100, 10**6) == 20
    assert kept.tokens(["keep"] * 4, 10, 0, 10**6) == 10
    assert kept.tokens(["keep"] * 4, 10, 10**9, 300) == 300


class Watched(Copies):
    """Travels in the CPU's own memory, and notes who is where."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.on_device: list[weakref.ref[torch.Tensor]] = []
        self.numbers = 0

    def send(self, x: torch.Tensor) -> Any:
        self.numbers += 1
        self.log.append(("send", self.numbers - 1))
        return self.numbers - 1, x.clone()

    def fetch(self, there: Any) -> Any:
        self.log.append(("fetch", there[0]))
        x = there[1].clone()
        self.on_device.append(weakref.ref(x))
        assert sum(one() is not None for one in self.on_device) <= 2
        return there[0], x

    def arrived(self, coming: Any) -> torch.Tensor:
        self.log.append(("use", coming[0]))
        return coming[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_offloaded_inputs_come_back_one_ahead(family: str) -> None:
    policy = Policy(plain(family)) if family == "gpt2" else Policy(*adapted(family, lora_dropout=0.2))
    fuse.fuse_policy(policy)
    expected = logps_and_gradients(policy)
    recomputation = Recomputation(policy.model)
    copies = Watched()
    recomputation._host = Host(copies)
    recomputation.set_all("offload")
    for _ in range(2):  # a second pass has nothing to do with the first
        copies.log.clear()
        copies.numbers = 0
        assert_same_bits(logps_and_gradients(policy), expected)
        assert copies.log == [
            ("send", 0), ("send", 1), ("fetch", 1), ("fetch", 0), ("use", 1), ("use", 0)
        ]  # fmt: skip


def test_a_function_that_computes_something_else_again_is_an_error() -> None:
    turns = iter([True, False])

    def fickle(x: torch.Tensor) -> torch.Tensor:
        return x.sin().exp().sin() if next(turns) else x.sin()

    x = torch.ones(3, requires_grad=True)
    out = recomputed(fickle, x, lambda kept: lambda: kept)
    with pytest.raises(RuntimeError, match="saved 1 tensors, and 3 in the first run"):
        out.sum().backward()


def test_a_family_that_cannot_recompute_says_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])
            self.embed = nn.Embedding(3, 2)

    decoder = Odd()
    model: Any = SimpleNamespace(get_decoder=lambda: decoder, get_input_embeddings=lambda: decoder.embed)
    recomputation = Recomputation(model, free=True)
    with pytest.raises(ModelError, match="Odd does not support it"):
        recomputation.set_all("layer")
    recomputation.set_all("keep")
    assert recomputation.more() == ""


def test_more_goes_up_to_whole_layers_and_only_where_it_is_free() -> None:
    model, _ = adapted("llama")
    fuse.fuse(model)
    recomputation = Recomputation(model, free=True)
    said = [recomputation.more() for _ in range(4)]
    assert said[0] == "recomputation: 2 of 2 layers make their norms again"
    assert said[2:] == ["recomputation: 2 of 2 layers keep their input only", ""]
    assert Recomputation(model).more() == ""


# --- in a run -----------------------------------------------------------------------------------------------


def test_a_run_recomputes_what_memory_asks_for_and_goes_on_so(
    run_config: MakeConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With little memory one document does not fit: some layers recompute, said and kept in the checkpoint; the
    losses are those of the run with plenty, to the last bit where the passes are the same."""
    caplog.set_level(logging.INFO, "luthier")
    values = dict(max_tokens_per_pass=300, save_steps=3, max_steps=4, lora_dropout=0.1)
    plenty = train(run_config(**values, output_dir=str(tmp_path / "plenty")))
    assert "recomputation: none, memory suffices" in caplog.text
    assert plenty.state.recomputed == ["keep", "keep"]
    caplog.clear()
    free = 14 * 8192 + 2 * 1_300_000
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    short = train(run_config(**values))
    assert "recomputation: " in caplog.text and "a pass of 300 tokens would take" in caplog.text
    assert short.state.recomputed != ["keep", "keep"] and short.state.tokens_per_pass == 300
    assert losses(tmp_path / "run") == losses(tmp_path / "plenty")
    state, _ = checkpoint.read_state(tmp_path / "run" / "checkpoint-3")
    assert state.recomputed == short.state.recomputed
    monkeypatch.undo()
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "luthier-cache"))
    caplog.clear()
    again = train(run_config(**{**values, "max_steps": 6}, resume_from_checkpoint="auto"))
    assert "as before" in caplog.text and again.state.recomputed == short.state.recomputed
    caplog.clear()
    off = run_config(**values, gradient_checkpointing=False, output_dir=str(tmp_path / "off"))
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert train(off).state.recomputed == [] and "recomputation" not in caplog.text
    assert losses(tmp_path / "off") == losses(tmp_path / "plenty")


def test_smaller_passes_come_before_recomputation(
    run_config: MakeConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole step does not fit, a pass at full speed does: nothing is recomputed."""
    monkeypatch.setattr(memory, "FULL_SPEED_TOKENS", {"cpu": 64})
    monkeypatch.setattr(memory, "free_memory", lambda device: 14 * 8192 + 2 * 2_000_000)
    result = train(run_config(micro_batch_size=8, max_steps=1))
    assert result.state.recomputed == ["keep", "keep"]
    assert 167 <= result.state.tokens_per_pass < 16 * 100


@pytest.mark.parametrize("free", ["auto", True], ids=["auto", "true"])
def test_a_document_that_memory_does_not_hold_turns_more_recomputation_on(
    run_config: MakeConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: Any,
) -> None:
    values = dict(max_tokens_per_pass=1, max_steps=2)
    train(run_config(**values, output_dir=str(tmp_path / "plenty")))
    build = run.build_policy

    def built(*arguments: Any, **options: Any) -> nn.Module:
        policy = build(*arguments, **options)
        forward = policy.forward

        def limited(batch: Any) -> Any:
            mlp = policy.model.get_decoder().layers[0].mlp.forward
            if policy.training and isinstance(mlp, FusedMLP) and (mlp.tile is None or free is True):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(batch)

        policy.forward = limited  # type: ignore[method-assign]
        return policy

    monkeypatch.setattr(run, "build_policy", built)
    if free is True:
        with pytest.raises(RunError, match="one document.*gradient_checkpointing: auto"):
            train(run_config(**values, gradient_checkpointing=True))
        return
    result = train(run_config(**values))
    said = capsys.readouterr().err
    assert said.count("out of memory at step 1 in one document: going on with recomputation: 2 of 2") == 2
    assert result.state.recomputed == ["mlp", "mlp"] and result.state.tokens_per_pass == 1
    assert losses(tmp_path / "run") == losses(tmp_path / "plenty")


@pytest.mark.parametrize("mode", [True, "offload"], ids=["true", "offload"])
def test_asked_for_it_is_done(
    run_config: MakeConfig,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: Any,
) -> None:
    caplog.set_level(logging.INFO, "luthier")
    values = dict(max_steps=2, max_tokens_per_pass=300)
    train(run_config(**values, gradient_checkpointing=False, output_dir=str(tmp_path / "off")))
    for kernels in ("auto", "reference"):
        folder = tmp_path / kernels
        train(run_config(**values, gradient_checkpointing=mode, kernels=kernels, output_dir=str(folder)))
        assert losses(folder) == pytest.approx(losses(tmp_path / "off"), abs=2e-6)
    assert ("offload: the model is in the host's memory already" in caplog.text) == (mode == "offload")


def test_what_unsloth_calls_it() -> None:
    values = {"base_model": "x", "datasets": [{"path": "x", "type": "alpaca"}]}
    config = Config.from_flat({**values, "gradient_checkpointing": "unsloth"})
    assert config.precision.gradient_checkpointing == "offload"
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: .*'offload_disk'.* Write offload."):
        Config.from_flat({**values, "gradient_checkpointing": "offload_disk"})


@pytest.mark.gpu
def test_offload_on_a_gpu() -> None:
    """Pinned memory and a side stream give the bits of inputs that stay."""
    policy = wide_policy(True).to("cuda")
    lengths = (64, 192)

    def gradients() -> list[torch.Tensor]:
        policy.train()
        ids = torch.arange(256, device="cuda") % 64
        positions = torch.cat([torch.arange(n) for n in lengths]).cuda()
        cu = torch.tensor([0, 64, 256], dtype=torch.int32, device="cuda")
        policy.hidden(ids, positions, lengths, cu).square().sum().backward()
        found = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        policy.zero_grad(set_to_none=True)
        return found

    recomputation = Recomputation(policy.model)
    recomputation.set_all("layer")
    expected = gradients()
    recomputation.set_all("offload")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def test_no_tokens_at_all() -> None:
    policy = Policy(*adapted("llama"))
    fuse.fuse_policy(policy)
    mlp = policy.model.get_decoder().layers[0].mlp.forward
    x = torch.zeros(0, 32, requires_grad=True)
    out = tiled_mlp(x, mlp._layers, mlp.kind, 4)
    out.sum().backward()
    assert out.shape == x.shape and x.grad is not None
