"""Optimizers: each is its library's own, resumes to the bit, and says where it cannot run; learning rates by group."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import schedulefree
import torch
from peft.optimizers import create_loraplus_optimizer
from pytorch_optimizer import SophiaH
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.optimization import Adafactor

from luthier.config import Config
from luthier.config.optimizers import ALIASES
from luthier.config.optimizers import OPTIMIZERS as KNOWN
from luthier.errors import ConfigError
from luthier.models.lora import add_lora
from luthier.train import bnb_optimizers, checkpoint
from luthier.train.optim import Masters
from luthier.train.optimizers import build_optimizer, check_optimizer, parameter_groups, set_labels
from luthier.train.run import train
from tests.train.conftest import losses

MakeConfig = Callable[..., Config]
NAMES = sorted(set(KNOWN) - set(ALIASES))
FULL: dict[str, Any] = dict(adapter=None, lora_r=None, learning_rate=1e-3)
CPU = torch.device("cpu")


class _Net(nn.Module):
    """An embedding, a matrix of 64 x 80 (large enough for 8-bit states), a vector; no head of its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(12, 64)
        self.inner = nn.Linear(64, 80)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self) -> torch.Tensor:
        return self.inner(self.embed(torch.arange(12)).tanh()).square().mean()


def _training(name: str, **values: Any) -> Any:
    flat = {"base_model": "m", "datasets": [{"path": "d", "type": "alpaca"}], "optimizer": name}
    return Config.from_flat({**flat, "learning_rate": 1e-2, "weight_decay": 0.1, **values}).training


# The library's own optimizer for the matrices or the vectors of _Net; `decay` is 0 for vectors.
_LIBRARY: dict[str, Callable[[list[torch.Tensor], float], torch.optim.Optimizer]] = {
    "adamw_torch": lambda p, decay: torch.optim.AdamW(p, lr=1e-2, weight_decay=decay),
    "adamw_torch_fused": lambda p, decay: torch.optim.AdamW(p, lr=1e-2, weight_decay=decay, fused=True),
    "adam": lambda p, decay: torch.optim.Adam(p, lr=1e-2, weight_decay=decay),
    "sgd": lambda p, decay: torch.optim.SGD(p, lr=1e-2, weight_decay=decay),
    "adamw_bnb_8bit": lambda p, decay: bnb.optim.AdamW8bit(p, lr=1e-2, weight_decay=decay),
    "paged_adamw_8bit": lambda p, decay: bnb.optim.AdamW8bit(p, lr=1e-2, weight_decay=decay),
    "paged_adamw_32bit": lambda p, decay: bnb.optim.AdamW(p, lr=1e-2, weight_decay=decay),
    "lion_8bit": lambda p, decay: bnb.optim.Lion8bit(p, lr=1e-2, weight_decay=decay),
    "paged_lion_8bit": lambda p, decay: bnb.optim.Lion8bit(p, lr=1e-2, weight_decay=decay),
    "ademamix_8bit": lambda p, decay: bnb.optim.AdEMAMix8bit(p, lr=1e-2, weight_decay=decay),
    "paged_ademamix_8bit": lambda p, decay: bnb.optim.AdEMAMix8bit(p, lr=1e-2, weight_decay=decay),
    "adafactor": lambda p, decay: Adafactor(
        p, lr=1e-2, weight_decay=decay, scale_parameter=False, relative_step=False
    ),
    "schedule_free_adamw": lambda p, decay: schedulefree.AdamWScheduleFree(p, lr=1e-2, weight_decay=decay),
}


@pytest.mark.parametrize("name", sorted(_LIBRARY))
def test_steps_are_the_librarys(name: str) -> None:
    """Four steps, on the same gradients, of a matrix with weight decay and a vector without."""
    ours, theirs = _Net(), _Net()
    masters = Masters(ours)
    optimizer = build_optimizer(masters, _training(name))
    matrices, vectors = [p for p in theirs.parameters() if p.dim() == 2], [theirs.inner.bias]
    library = [_LIBRARY[name](matrices, 0.1), _LIBRARY[name](vectors, 0.0)]
    began = ours().item()
    for each in library:
        if hasattr(each, "train"):
            each.train()
    for _ in range(4):
        ours().backward()
        theirs().backward()
        optimizer.step()
        masters.zero_grad()
        for each in library:
            each.step()
            each.zero_grad()
    for each in (optimizer, *library):
        if hasattr(each, "eval"):
            each.eval()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    assert ours().item() < began


def test_muon_is_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    ours, theirs = _Net(), _Net()
    masters = Masters(ours)
    assert masters.hidden == {"inner.weight"}
    optimizer = build_optimizer(masters, _training("muon", optim_args={"momentum": 0.8}))
    library = [
        torch.optim.Muon(
            [theirs.inner.weight], lr=1e-2, weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([theirs.embed.weight], lr=1e-2, weight_decay=0.1, fused=True),
        torch.optim.AdamW([theirs.inner.bias], lr=1e-2, weight_decay=0.0, fused=True),
    ]
    for _ in range(3):
        ours().backward()
        theirs().backward()
        optimizer.step()
        optimizer.zero_grad()
        for each in library:
            each.step()
            each.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_sophia_is_the_librarys_with_the_empirical_fisher() -> None:
    """The library is handed gamma * labels * gradient**2 at the first and the third step."""
    ours, theirs = _Net(), _Net()
    masters = Masters(ours)
    optimizer = build_optimizer(
        masters, _training("sophia", weight_decay=0.0, optim_args={"update_period": 2, "gamma": 0.03})
    )
    set_labels(optimizer, 12.0)
    library = SophiaH(theirs.parameters(), lr=1e-2, betas=(0.965, 0.99), p=1.0, update_period=2)
    began = ours().item()
    for step in range(4):
        ours().backward()
        theirs().backward()
        optimizer.step()
        masters.zero_grad()
        estimate = [0.03 * 12 * p.grad**2 for p in theirs.parameters() if p.grad is not None]
        library.step(hessian=estimate if step % 2 == 0 else None)
        library.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert ours().item() < began


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_to_the_last_bit(run_config: MakeConfig, tmp_path: Path, name: str) -> None:
    """Four steps at one go, and two that are gone on with; the loss falls."""
    values = {
        **FULL,
        "optimizer": name,
        "learning_rate": 0.5 if name == "sgd" else 3e-3,
        "weight_decay": 0.01,
        "max_steps": 4,
        "save_steps": 2,
        "warmup_steps": 1,
        "train_last_n_layers": 1,
        "freeze_embeddings": True,
    }
    train(run_config(**values))
    folder = tmp_path / "run"
    whole = losses(folder)
    last = checkpoint.read_masters(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-4")
    train(run_config(**values, resume_from_checkpoint="auto"))
    assert losses(folder) == whole and len(whole) == 4 and whole[-1] < whole[0]
    again = checkpoint.read_masters(folder / "checkpoint-4")
    assert all(torch.equal(last[name], again[name]) for name in last)


def test_a_schedule_free_run_saves_its_average_and_trains_on_as_if_nobody_had_looked(
    run_config: MakeConfig, tmp_path: Path
) -> None:
    values = {**FULL, "optimizer": "schedule_free_adamw", "max_steps": 5, "val_set_size": 6}
    train(run_config(**values, save_steps=5, eval_steps=5, output_dir=str(tmp_path / "unseen")))
    train(run_config(**values, save_steps=1, eval_steps=1))
    assert losses(tmp_path / "run") == losses(tmp_path / "unseen")
    # What was evaluated is what was saved: the average, not the weights that gradients were taken at.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    averaged = checkpoint.read_masters(tmp_path / "run" / "checkpoint-5")
    trained = checkpoint.load_file(tmp_path / "run" / "checkpoint-5" / "optimizer.safetensors")
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, averaged[name])
        assert not torch.equal(parameter, trained[f"y/{name}"])
        # y lies between x and z (Defazio et al. 2023, equation 1): beta1 of the way towards x
        between = torch.lerp(trained[f"z/{name}"], averaged[name], 0.9)
        torch.testing.assert_close(trained[f"y/{name}"], between)


def test_eight_bit_states_are_in_eight_bits_and_small_ones_are_not() -> None:
    net = _Net()
    optimizer = build_optimizer(Masters(net), _training("adamw_8bit"))
    net().backward()
    optimizer.step()
    assert optimizer.state[net.inner.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[net.inner.bias]["state1"].dtype == torch.float32
    assert net.inner.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit"])
def test_paged_state_is_put_back_into_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded is copied into memory that the library hands out as it does for new state, with the same
    result; on a CPU those are ordinary tensors."""
    pages: list[torch.Tensor] = []
    for kind in ("get_state_buffer", "_get_state_double_buffer"):
        original = getattr(bnb.optim.AdEMAMix8bit, kind)

        def noted(*arguments: Any, original: Any = original, **options: Any) -> torch.Tensor:
            pages.append(original(*arguments, **options))
            return pages[-1]

        for each in (bnb.optim.AdamW8bit, bnb.optim.AdamW32bit, bnb.optim.AdEMAMix8bit):
            monkeypatch.setattr(each, kind, noted, raising=False)

    def steps(weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    one = nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128))
    other = nn.Parameter(torch.zeros(64, 128))
    ours, theirs = (
        bnb_optimizers.build(name, [{"params": [p]}], 1e-2, {}, paged=True) for p in (one, other)
    )
    steps(one, ours)
    other.data.copy_(one)
    pages.clear()
    theirs.load_state_dict(ours.state_dict())
    kept = [theirs.state[other][field] for field in ("state1", "state2")]
    assert [id(tensor) for tensor in kept] == [id(page) for page in pages]
    steps(one, ours)
    steps(other, theirs)
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_state_are_what_the_optimizer_keeps(name: str) -> None:
    """Counted for one matrix of 640 x 512, whose state's odds and ends (counters, tables) are below 1%."""
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(640, 512))
    optimizer = build_optimizer(Masters(holder), _training(name))
    holder.weight.square().mean().backward()
    optimizer.step()
    kept = sum(v.nbytes for v in optimizer.state[holder.weight].values() if isinstance(v, torch.Tensor))
    info, count = KNOWN[name], holder.weight.numel()
    expected = info.state if info.matrices is None else info.matrices
    if info.factored:
        expected = 4 * (640 + 512) / count
    assert kept / count == pytest.approx(expected, rel=0.01, abs=1e-4)


def test_the_documents_table_has_every_optimizer_and_its_bytes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    said: dict[str, str] = {}
    for row in page.split("| optimizer |")[1].split("\n\n")[0].splitlines()[2:]:
        names, _, figures = (cell.strip() for cell in row.strip("|").split("|"))
        each, shown = names.replace("`", "").split(", "), figures.split(", ")
        said |= dict(zip(each, shown * (len(each) // len(shown)), strict=True))
    expected = {}
    for name, info in KNOWN.items():
        state = 0 if info.factored else info.state if info.matrices is None else info.matrices
        expected[name] = f"{state:.2f}".rstrip("0").rstrip(".")
    assert said == expected


def test_the_tables_momentum_is_sgds() -> None:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(64, 64))
    optimizer = build_optimizer(Masters(holder), _training("sgd", optim_args={"momentum": 0.9}))
    holder.weight.square().mean().backward()
    optimizer.step()
    kept = sum(v.nbytes for v in optimizer.state[holder.weight].values() if isinstance(v, torch.Tensor))
    assert kept / holder.weight.numel() == KNOWN["sgd"].with_momentum


def test_what_cannot_run_says_so_before_the_model_is_loaded(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(name: str, device: str, dtype: torch.dtype = torch.float32, **values: Any) -> None:
        check_optimizer(_training(name, **values), torch.device(device), dtype)

    with pytest.raises(ConfigError, match=r"adamw_bnb_8bit is bitsandbytes', which does not run on mps.*cuda"):
        check("adamw_8bit", "mps")
    check("adamw_torch_fused", "mps")
    check("paged_adamw_8bit", "cuda")
    assert not caplog.text
    check("paged_adamw_8bit", "cpu")
    assert "stays where it is" in caplog.text and "ten times" in caplog.text
    with pytest.raises(ConfigError, match="computes in float32"):
        check("adamw_torch", "cpu", bf16_stochastic_rounding=True)
    with pytest.raises(ConfigError, match="fp16"):
        check("adamw_torch", "cuda", torch.float16, optimizer_in_backward=True, max_grad_norm=0)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "schedulefree" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"needs schedulefree: pip install 'luthier\[optimizers\]'"):
        train(run_config(base_model="./nowhere-to-be-loaded", optimizer="schedule_free_adamw"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (dict(optimizer="muon", adapter="lora"), "muon is for the matrices"),
        (dict(optimizer="schedule_free_adamw", lr_scheduler="cosine"), "constant_with_warmup"),
        (dict(optimizer="schedule_free_adamw", bf16_stochastic_rounding=True), "leave out bf16_stochastic"),
        (dict(optimizer_in_backward=True), "max_grad_norm: 0"),
        (
            dict(optimizer_in_backward=True, max_grad_norm=0, micro_batch_size=4, gradient_accumulation_steps=2),
            "micro_batch_size: 8",
        ),
        (dict(optimizer_in_backward=True, max_grad_norm=0, max_tokens_per_pass=99), "one pass"),
        (dict(optimizer_in_backward=True, max_grad_norm=0, fp16=True, bf16=False), "take back a step"),
        (dict(optimizer_in_backward=True, max_grad_norm=0, adapter="lora"), "an adapter is small"),
        (dict(bf16_stochastic_rounding=True, bf16=False), "write `bf16: true`"),
        (dict(loraplus_lr_ratio=16), "adapter: lora"),
        (dict(adapter="lora", loraplus_lr_embedding=1e-5), "set loraplus_lr_ratio too"),
        (dict(optimizer="lion_8bit", adam_beta2=0.9), "adam optimizers"),
        (dict(lr_groups=[dict(name="a", modules=["("], lr=1e-3)]), "not a regular expression"),
        (dict(lr_groups=[dict(name="a", modules=[], lr=1e-3)]), "names no modules"),
        (dict(lr_groups=[dict(name="a", modules=["x"], lr=1e-3)] * 2), "two groups are called a"),
        (dict(lr_groups=[dict(name="a", modules=["x"])]), "lr_groups.0.lr is missing"),
    ],
)
def test_what_excludes_each_other(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _training(values.pop("optimizer", "adamw_torch"), **values)


def test_arguments_that_an_optimizer_does_not_take() -> None:
    masters = Masters(_Net())
    for name in ("adamw_8bit", "sophia", "muon", "adafactor", "schedule_free_adamw"):
        with pytest.raises(ConfigError, match=r"does not take \{'nonsense': 1\}"):
            build_optimizer(masters, _training(name, optim_args={"nonsense": 1}))
    with pytest.raises(ConfigError, match="adam_beta1 and adam_beta2"):
        build_optimizer(masters, _training("ademamix_8bit", optim_args={"betas": [0.1, 0.2, 0.3]}))
    build_optimizer(masters, _training("lion_8bit", optim_args={"betas": [0.95, 0.98]}))


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_and_that_is_said_before_the_model_is_loaded(name: str) -> None:
    device = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"does not take \{'nonsense': 1\}"):
        check_optimizer(_training(name, optim_args={"nonsense": 1}), device, torch.float32)
    with pytest.raises(ConfigError, match="lr has a key of its own"):
        check_optimizer(_training(name, optim_args={"lr": 1}), device, torch.float32)


def _with_adapter(folder: Path, **keys: Any) -> tuple[nn.Module, Any]:
    values = dict(adapter="lora", lora_r=4, lora_target_modules=["q_proj", "embed_tokens"], peft_use_dora=True)
    config = Config.from_flat(
        {
            "base_model": str(folder),
            "datasets": [{"path": "d", "type": "alpaca"}],
            "learning_rate": 1e-3,
            **values,
            **keys,
        }
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    add_lora(model, config.adapter, 0)
    return model, config.training


def test_lora_plus_has_the_rates_of_pefts(toy_llama_dir: Path) -> None:
    """Of A, B, DoRA's vectors, and of an adapter on the embedding."""
    model, training = _with_adapter(toy_llama_dir, loraplus_lr_ratio=16, loraplus_lr_embedding=3e-5)
    masters = Masters(model)
    names = {id(master): name for name, master in masters.masters.items()}
    ours = {
        names[id(p)]: 1e-3 * group["lr_factor"]
        for group in parameter_groups(masters, training)
        for p in group["params"]
    }
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(toy_llama_dir),
        peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], use_dora=True),
    )
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=3e-5
    )
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        name.removeprefix("base_model.model.").split(".default")[0]: rates[id(p)]
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert set(ours) == set(expected) and len(set(expected.values())) == 3
    for name in ours:
        assert ours[name] == pytest.approx(expected[name], rel=1e-12), name


def test_every_group_follows_the_schedule_at_its_own_rate(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group at the rate 0.02, and all others at learning_rate: two runs' steps in one."""
    seen: list[dict[float, float]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: Any) -> Any:
        seen.append({group["lr_factor"]: group["lr"] for group in self.param_groups})
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    groups = [dict(name="values", modules=["v_proj"], lr=0.02), dict(name="one", modules=[r"layers\.1\."], lr=0.005)]
    result = train(run_config(lr_groups=groups, warmup_steps=2, max_steps=4))
    assert len(seen) == 4 and all(set(each) == {1.0, 2.0, 0.5} for each in seen)
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert rates[0] == 0 and max(rates) == 0.01
    assert [each[1.0] for each in seen] == rates
    assert [each[2.0] for each in seen] == [2 * rate for rate in rates]


def test_of_two_groups_the_first_has_a_parameter_and_one_without_any_is_an_error(toy_llama_dir: Path) -> None:
    def rates(*groups: dict[str, Any]) -> dict[str, float]:
        model, training = _with_adapter(toy_llama_dir, lr_groups=list(groups), peft_use_dora=False)
        masters = Masters(model)
        names = {id(master): name for name, master in masters.masters.items()}
        found = parameter_groups(masters, training)
        return {names[id(p)]: group["lr_factor"] for group in found for p in group["params"]}

    first, queries = dict(name="first", modules=["layers.0."], lr=2e-3), dict(name="q", modules=["q_proj"], lr=5e-3)
    found = rates(first, queries)
    assert {rate for name, rate in found.items() if "layers.0." in name} == {2.0}
    assert {rate for name, rate in found.items() if "layers.1." in name} == {5.0}
    assert {rate for name, rate in found.items() if "embed" in name} == {1.0}
    with pytest.raises(ConfigError, match="all that it fits belongs to q, which"):
        rates(queries, first)
    with pytest.raises(ConfigError, match=r"z: no trained parameter fits k_proj; there are .*layers\.N\.self_attn"):
        rates(dict(name="z", modules=["k_proj"], lr=1e-3))
