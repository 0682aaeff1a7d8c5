"""Several adapters on one base: each text gets what its adapter alone, merged, gives it."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import ConfigError, ModelError
from luthier.generate.engine import Engine
from luthier.generate.rows import Row
from luthier.generate.sampling import Sampling
from luthier.models.assemble import open_for_inference
from luthier.models.lean import LeanAttention, LeanLayer, LeanMLP
from luthier.models.several import Several, name_of, open_several
from luthier.models.speakers import SeveralLinear, Speakers
from tests.models.toy_folders import adapter_folder, base_folder

# Two adapters of one base: other targets, ranks, strengths, one of them rank-stabilised, one with patterns.
ONE: dict[str, Any] = dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)
OTHER: dict[str, Any] = dict(
    r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "o_proj", "up_proj"], rank_pattern={"k_proj": 5}
)
ON_GPT2 = (
    dict(r=4, lora_alpha=12, target_modules=["c_attn"]),
    dict(r=2, lora_alpha=5, target_modules=["c_attn", "c_proj"]),
)
ON_PHI3 = (
    dict(r=4, lora_alpha=12, target_modules=["qkv_proj"]),
    dict(r=2, lora_alpha=5, target_modules=["o_proj", "down_proj"]),
)
ON_BLOOM = (
    dict(r=4, lora_alpha=12, target_modules=["query_key_value"]),
    dict(r=2, lora_alpha=5, target_modules=["query_key_value", "dense"]),
)
WITH_HEAD = (ONE, dict(r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"]))
SAMPLING = Sampling(max_new_tokens=12, do_sample=False)


def ask(several: Several, names: list[str], scores: bool = False) -> list[Row]:
    """Rows of several names, answered in one loop; every second one joins a step later."""
    engine = Engine(several.model, several.tokenizer, [])
    rows = []
    for name, prompt in zip(names, prompts(len(names)), strict=True):
        [row] = engine.rows([prompt], SAMPLING)
        row.adapter = several.adapter_of(name)
        row.scores_of = range(40) if scores else None
        rows.append(row)
    loop = several.loop(engine)
    loop.submit(rows[::2])
    loop.step()
    loop.submit(rows[1::2])
    while loop.step():
        pass
    return rows


def prompts(count: int) -> list[list[int]]:
    """The last three begin alike: what one adapter has read must not be taken for another."""
    rng = random.Random(3)
    texts = [[rng.randrange(5, 300) for _ in range(rng.randrange(3, 30))] for _ in range(count - 3)]
    shared = [rng.randrange(5, 300) for _ in range(20)]
    return [*texts, *([*shared, 7 + n] for n in range(3))]


@pytest.mark.parametrize(
    ("family", "adapters"),
    [
        ("llama", (ONE, OTHER)),
        ("qwen2", (ONE, OTHER)),
        ("gemma2", (ONE, OTHER)),
        ("gpt2", ON_GPT2),
        ("phi3", ON_PHI3),
        ("llama", WITH_HEAD),
        ("bloom", ON_BLOOM),  # takes no flat passes: prompts of one length go together
    ],
)
def test_each_text_is_its_own_adapters(
    family: str, adapters: tuple[dict[str, Any], ...], tmp_path: Path, toy_tokenizer: Any
) -> None:
    base = base_folder(tmp_path / "base", family, toy_tokenizer)
    paths = [adapter_folder(tmp_path / f"run-{n}", base, n, **settings) for n, settings in enumerate(adapters)]
    several = open_several([str(paths[0]), str(base), str(paths[1])])
    assert several.names == ["run-0", "base", "run-1"]
    assert any(isinstance(module, SeveralLinear) for module in several.model.modules())
    names = [["run-0", "base", "run-1"][n % 3] for n in range(9)]
    mixed, scored = ask(several, names), ask(several, names, scores=True)
    answers = set()
    for name, path in zip(several.names, [paths[0], base, paths[1]], strict=True):
        model, tokenizer, _ = open_for_inference(str(path))
        alone = Engine(model, tokenizer, [])
        own = [at for at, other in enumerate(names) if other == name]
        expected = alone.generate([mixed[at].prompt_ids for at in own], SAMPLING)
        assert [mixed[at].token_ids for at in own] == [one.token_ids for one in expected]
        logps: dict[int, list[float]] = {}
        alone.next_logps([mixed[at].prompt_ids for at in own], [range(40)] * len(own), logps.__setitem__)
        for place, at in enumerate(own):
            torch.testing.assert_close(
                torch.tensor(scored[at].logps), torch.tensor(logps[place]), rtol=1e-5, atol=1e-5
            )
        answers.add(str([one.token_ids for one in alone.generate(prompts(9), SAMPLING)]))
    assert len(answers) == 3  # they differ, so that a mistake would be seen


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_base_in_4_bits(toy_llama_dir: Path, tmp_path: Path) -> None:
    """Alone the adapter stays beside the quantised weights as well, so that both compute the same."""
    folders = []
    for n, settings in enumerate((ONE, OTHER)):
        folder = adapter_folder(tmp_path / f"run-{n}", toy_llama_dir, n, **settings)
        text = (
            f"base_model: {toy_llama_dir}\nadapter: lora\nload_in_4bit: true\n"
            "datasets: [{path: rows.jsonl, type: alpaca}]\n"
        )
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        folders.append(str(folder))
    several = open_several([*folders, str(toy_llama_dir)])
    assert {m.storage for m in several.model.modules() if isinstance(m, SeveralLinear)} == {"4bit"}
    names = ["run-0", "run-1"] * 3
    rows = ask(several, names)
    for name, path in zip(("run-0", "run-1"), folders, strict=True):
        model, tokenizer, run = open_for_inference(path)
        assert run is not None
        own = [row for row, other in zip(rows, names, strict=True) if other == name]
        expected = Engine(model, tokenizer, []).generate([row.prompt_ids for row in own], SAMPLING)
        assert [row.token_ids for row in own] == [one.token_ids for one in expected]


def test_one_target_is_merged(toy_llama_dir: Path, tmp_path: Path) -> None:
    path = adapter_folder(tmp_path / "run", toy_llama_dir, 0, **ONE)
    several = open_several([str(path)], names=["mine"])
    assert several.names == ["mine"]
    assert several.adapter_of("mine") is None
    assert not any(isinstance(module, SeveralLinear) for module in several.model.modules())


def test_an_adapter_multiplies_its_own_tokens_only(toy_llama_dir: Path, tmp_path: Path) -> None:
    paths = [str(adapter_folder(tmp_path / f"run-{n}", toy_llama_dir, n, **ONE)) for n in range(2)]
    several = open_several([*paths, str(toy_llama_dir)])
    speakers = several.speakers
    assert speakers is not None
    with speakers.speaking(["run-0", None, "run-1", "run-0"], [3, 5, 1, 2]):
        assert speakers.of(11)["run-1"] == slice(8, 9)
        assert speakers.of(11)["run-0"].tolist() == [0, 1, 2, 9, 10]
        assert speakers.of(4)["run-0"].tolist() == [0, 3]
        with pytest.raises(ModelError, match="cannot tell whose"):
            speakers.of(6)
    with speakers.speaking([None, None], [3, 5]):
        assert speakers.of(6) == {}


@pytest.fixture
def two(tmp_path: Path, toy_llama_dir: Path) -> tuple[Path, Path]:
    return (
        adapter_folder(tmp_path / "one", toy_llama_dir, 0, **ONE),
        adapter_folder(tmp_path / "two", toy_llama_dir, 1, **OTHER),
    )


def test_adapters_of_different_bases(two: tuple[Path, Path], tmp_path: Path, toy_tokenizer: Any) -> None:
    other = base_folder(tmp_path / "other-base", "llama", toy_tokenizer)
    third = adapter_folder(tmp_path / "three", other, 2, **ONE)
    with pytest.raises(ModelError, match=r"other-base: start one server for each, or merge"):
        open_several([str(two[0]), str(third)])
    with pytest.raises(ModelError, match="whole models"):
        open_several([str(other), str(other)], names=["a", "b"])


def test_bases_that_are_loaded_otherwise(two: tuple[Path, Path], toy_llama_dir: Path) -> None:
    text = f"base_model: {toy_llama_dir}\nadapter: lora\nload_in_4bit: true\ndatasets: [{{path: r, type: alpaca}}]\n"
    (two[1] / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"load otherwise \(load_in_4bit: False and True\)"):
        open_several([str(path) for path in two])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(use_dora=True), "DoRA"),
        (dict(modules_to_save=["lm_head"]), r"whole modules of its own \(lm_head\)"),
        (dict(target_modules=["embed_tokens", "q_proj"]), "adapts embeddings"),
    ],
)
def test_what_is_more_than_linear_layers(
    settings: dict[str, Any], says: str, two: tuple[Path, Path], tmp_path: Path, toy_llama_dir: Path
) -> None:
    third = adapter_folder(tmp_path / "three", toy_llama_dir, 2, **(ONE | settings))
    with pytest.raises(ModelError, match=says):
        open_several([str(two[0]), str(third)])


def test_tokenizers_that_differ(two: tuple[Path, Path], toy_tokenizer: Any) -> None:
    import copy

    grown = copy.deepcopy(toy_tokenizer)
    grown.add_tokens(["<new>"])
    grown.save_pretrained(two[1])
    with pytest.raises(ModelError, match=r"different tokens \(<new>\)"):
        open_several([str(path) for path in two])


def test_a_weight_of_the_base_in_an_adapters_file(two: tuple[Path, Path]) -> None:
    from safetensors.torch import load_file, save_file

    file = two[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
    tensors[key.replace("lora_A.weight", "base_layer.weight")] = torch.zeros(64, 64)
    save_file(tensors, file)
    with pytest.raises(ModelError, match="another than the base's"):
        open_several([str(path) for path in two])


def test_names(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    assert name_of(str(tmp_path / "run" / "checkpoint-5")) == "run/checkpoint-5"
    assert name_of(str(tmp_path / "run")) == "run"
    assert name_of("owner/model") == "owner/model"
    with pytest.raises(ConfigError, match=r"two models are called 'one': name them all"):
        open_several([str(two[0]), str(two[0])])
    with pytest.raises(ConfigError, match=r"two models are called 'a': give each a name of its own"):
        open_several([str(path) for path in two], names=["a", "a"])
    with pytest.raises(ConfigError, match="1 name for 2 models"):
        open_several([str(path) for path in two], names=["a"])
    with pytest.raises(ModelError, match=r"nothing-here is no folder here.*check the path"):
        open_several([str(two[0]), str(tmp_path / "nothing-here")])


def test_equal_numbers_of_tokens_and_texts() -> None:
    speakers = Speakers(torch.device("cpu"))
    with speakers.speaking(["a", "b"], [1, 1]):
        assert speakers.of(2) == {"a": slice(0, 1), "b": slice(1, 2)}


def test_a_file_that_is_no_adapter(two: tuple[Path, Path]) -> None:
    (two[1] / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}), encoding="utf-8")
    with pytest.raises(ModelError, match="only LORA adapters"):
        open_several([str(path) for path in two])


def test_lean_forwards_stay(two: tuple[Path, Path], toy_llama_dir: Path) -> None:
    """Layers with one input are one multiply with adapters beside them too."""
    several = open_several([str(path) for path in two])
    kinds = {type(vars(module).get("forward")) for module in several.model.modules()}
    assert {LeanMLP, LeanAttention, LeanLayer} <= kinds
