"""Several adapters as one: the tensors of PEFT's `add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from luthier.cli import main
from luthier.errors import ConfigError, ModelError
from luthier.export.adapters import read_adapter
from luthier.export.combine import check_options, combine
from tests.export.conftest import loaded, logits

NAME = "both"


def theirs(base: Path, folders: Sequence[Path], weights: Sequence[float], **values: Any) -> Any:
    """PEFT's model with the combined adapter active; random draws begin where ours do."""
    model = peft.PeftModel.from_pretrained(loaded(base), folders[0], adapter_name="a0")
    for index, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, f"a{index}")
    seed, inject = values.pop("seed", 0), model.base_model.inject_adapter

    def inject_and_seed(*args: Any, **kwargs: Any) -> None:  # a new adapter's start is drawn as well
        inject(*args, **kwargs)
        torch.manual_seed(seed)

    model.base_model.inject_adapter = inject_and_seed
    names = [f"a{index}" for index in range(len(folders))]
    model.add_weighted_adapter(names, list(weights), NAME, **values)
    model.set_adapter(NAME)
    return model.eval()


def ours(base: Path, folders: Sequence[Path], weights: Sequence[float], method: str, **values: Any) -> Any:
    paths = [path for path, _ in loaded(base).named_modules()]
    return combine([read_adapter(folder) for folder in folders], weights, method, paths, **values)


@pytest.fixture
def two(base_dir: Callable[..., Path], peft_adapter: Any) -> tuple[Path, list[Path]]:
    """Adapters of different strength for partly different layers."""
    base = base_dir("llama")
    first = peft_adapter(base, seed=1)[1]
    second = peft_adapter(base, seed=2, lora_alpha=3, target_modules=["v_proj", "o_proj", "up_proj"])[1]
    return base, [first, second]


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("linear", {}),
        ("cat", {}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 1.0}),
        ("dare_ties", {"density": 0.6, "seed": 7}),
    ],
)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.5)])
def test_tensors_are_pefts(
    method: str, values: dict[str, Any], weights: tuple[float, float], two: tuple[Path, list[Path]]
) -> None:
    base, folders = two
    expected = theirs(base, folders, weights, combination_type=method, **values)
    found = ours(base, folders, weights, method, **values)
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in expected.named_modules()
        if hasattr(module, "lora_A") and NAME in module.lora_A
    }
    assert found.deltas.keys() == layers.keys()
    for path, layer in layers.items():
        delta = found.deltas[path]
        assert layer.scaling[NAME] == delta.scale == 1.0
        torch.testing.assert_close(delta.a, layer.lora_A[NAME].weight.data, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(delta.b, layer.lora_B[NAME].weight.data, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rank", [None, 2, 9])
def test_svd_adds_what_pefts_adds(rank: int | None, two: tuple[Path, list[Path]]) -> None:
    """Singular vectors have a sign to choose, so the products are compared."""
    base, folders = two
    expected = theirs(base, folders, (0.7, 0.3), combination_type="svd", svd_rank=rank)
    found = ours(base, folders, (0.7, 0.3), "svd", rank=rank)
    for path, delta in found.deltas.items():
        layer = expected.base_model.model.get_submodule(path)
        assert delta.r == layer.r[NAME]
        torch.testing.assert_close(delta.b @ delta.a, layer.get_delta_weight(NAME), atol=1e-5, rtol=1e-4)


def test_another_seed_drops_other_entries(two: tuple[Path, list[Path]]) -> None:
    base, folders = two
    results = [ours(base, folders, (1, 1), "dare_ties", density=0.5, seed=seed) for seed in (0, 0, 1)]
    first = [next(iter(result.deltas.values())).a for result in results]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_ranks_may_differ_for_cat_and_svd_only(base_dir: Callable[..., Path], peft_adapter: Any) -> None:
    base = base_dir("llama")
    folders = [peft_adapter(base, r=r)[1] for r in (4, 2)]
    expected = theirs(base, folders, (0.5, 0.5), combination_type="cat")
    found = ours(base, folders, (0.5, 0.5), "cat")
    path, delta = next(iter(found.deltas.items()))
    layer = expected.base_model.model.get_submodule(path)
    torch.testing.assert_close(delta.b @ delta.a, layer.get_delta_weight(NAME), atol=1e-6, rtol=1e-5)
    with pytest.raises(ModelError, match="equal rank.* cat and svd take any"):
        ours(base, folders, (0.5, 0.5), "linear")


def test_rank_stabilised_scaling_goes_in_once(base_dir: Callable[..., Path], peft_adapter: Any) -> None:
    """PEFT leaves `use_rslora` on in the result; the sum of what the adapters add is the measure here."""
    base = base_dir("llama")
    made = [peft_adapter(base, seed=seed, use_rslora=True) for seed in (1, 2)]
    found = ours(base, [folder for _, folder in made], (0.5, 2.0), "cat")
    for path, delta in found.deltas.items():
        parts = [model.base_model.model.get_submodule(path).get_delta_weight("default") for model, _ in made]
        torch.testing.assert_close(delta.b @ delta.a, 0.5 * parts[0] + 2 * parts[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ["c_attn"]), ("llama", ["embed_tokens", "q_proj"])])
def test_combined_adapter_on_disk_and_merged(
    family: str, targets: list[str], base_dir: Callable[..., Path], peft_adapter: Any, tmp_path: Path
) -> None:
    """The adapter loads in PEFT with the logits of PEFT's own combination; merged it gives them as well."""
    base = base_dir(family)
    folders = [peft_adapter(base, seed=seed, target_modules=targets)[1] for seed in (1, 2)]
    expected = logits(theirs(base, folders, (0.6, 0.9), combination_type="ties", density=0.5))
    call = ["merge-lora", f"{folders[0]}:0.6", "--adapter", f"{folders[1]}:0.9", "--method", "ties", "--density=0.5"]
    assert main([*call, "--adapter-only", "--out", str(tmp_path / "one")]) == 0
    loads = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "one").eval()
    torch.testing.assert_close(logits(loads), expected, atol=2e-5, rtol=1e-5)
    assert main([*call, "--dtype", "float32", "--out", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("values", [{}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}], ids=["r", "ranks"])
def test_one_adapter_at_half_its_strength(
    values: dict[str, Any], base_dir: Callable[..., Path], peft_adapter: Any, tmp_path: Path
) -> None:
    base = base_dir("llama")
    model, folder = peft_adapter(base, **values)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: scale / 2 for name, scale in module.scaling.items()}
    expected = logits(model)
    assert main(["merge-lora", f"{folder}:0.5", "--dtype", "float32"]) == 0
    torch.testing.assert_close(logits(loaded(folder / "merged")), expected, atol=2e-5, rtol=1e-5)
    assert main(["merge-lora", f"{folder}:0.5", "--adapter-only", "--out", str(tmp_path / "half")]) == 0
    half = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "half").eval()
    torch.testing.assert_close(logits(half), expected, atol=2e-5, rtol=1e-5)
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert load_file(tmp_path / "half" / "adapter_model.safetensors").keys() == names


@pytest.mark.parametrize(
    ("method", "values", "says"),
    [
        ("mean", {}, "there is no 'mean'; there are linear, cat"),
        ("ties", {}, "ties needs --density"),
        ("ties", {"density": 1.5}, "above 0 and at most 1"),
        ("linear", {"density": 0.5}, "--density does nothing with --method linear"),
        ("cat", {"rank": 4}, "--rank does nothing with --method cat"),
        ("ties", {"density": 0.5, "seed": 1}, "--seed does nothing with --method ties"),
        ("svd", {"rank": 0}, "at least 1"),
    ],
)
def test_options_that_do_nothing_are_errors(method: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_options(method, [1.0], **{"density": None, "rank": None, "seed": None, **values})


def test_adapters_that_cannot_be_combined(base_dir: Callable[..., Path], peft_adapter: Any) -> None:
    base = base_dir("llama")
    plain = peft_adapter(base)[1]
    dora = peft_adapter(base, use_dora=True)[1]
    whole = [peft_adapter(base, modules_to_save=["lm_head"])[1] for _ in range(2)]
    with pytest.raises(ModelError, match="DoRA"):
        ours(base, [plain, dora], (1, 1), "cat")
    with pytest.raises(ModelError, match=r"more than one of the adapters trained lm_head\.weight whole"):
        ours(base, whole, (1, 1), "cat")
    with pytest.raises(ConfigError, match="the weights are all 0"):
        ours(base, [plain, plain], (0, 0), "cat")
