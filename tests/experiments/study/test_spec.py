"""What a study says, as runs; and what is wrong with one, all of it at once and with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.errors import ConfigError
from luthier.experiments.study.expand import Expanded, expand, name_of
from luthier.experiments.study.expressions import ExpressionError, evaluate, follows_itself
from luthier.experiments.study.spec import read

from .conftest import BASE, Write


def runs_of(path: Path, *overrides: str) -> Expanded:
    return expand(read(path, overrides))


def settings_of(path: Path, *overrides: str) -> list[dict[str, Any]]:
    return [run.settings for run in runs_of(path, *overrides).runs]


def fails(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        runs_of(path, *overrides)
    return str(caught.value)


def test_a_grid_is_every_combination_for_each_seed(write: Write):
    found = runs_of(write({"grid": {"lora_r": [8, 16], "lora_alpha": ["=lora_r/2", "=2*lora_r"]}, "seeds": 2})).runs
    assert [(run.config.adapter.lora_r, run.config.adapter.lora_alpha, run.config.training.seed) for run in found] == [
        (8, 4, 0), (8, 16, 0), (16, 8, 0), (16, 32, 0), (8, 4, 1), (8, 16, 1), (16, 8, 1), (16, 32, 1)
    ]  # fmt: skip
    assert found[0].name == "r8-alpha4-s0"
    assert found[0].settings == {"lora_r": 8, "lora_alpha": 4}
    assert found[0].changed == {"lora_r": 8, "lora_alpha": 4, "seed": 0}


def test_runs_are_crossed_with_the_grid(write: Write):
    study = {
        "runs": [{"name": "small", "lora_r": 4}, {"name": "full", "adapter": None, "lora_r": None}],
        "grid": {"learning_rate": [1e-4, 1e-3]},
    }
    found = runs_of(write(study)).runs
    assert [run.settings for run in found] == [
        {"run": "small", "learning_rate": 1e-4},
        {"run": "small", "learning_rate": 1e-3},
        {"run": "full", "learning_rate": 1e-4},
        {"run": "full", "learning_rate": 1e-3},
    ]
    assert found[2].config.adapter.adapter is None  # null leaves a key of the base out
    assert "adapter" not in yaml.safe_load(found[2].text(Path("x"), "study"))


def test_several_keys_go_together_under_a_name_or_without(write: Write):
    sizes = [{"name": "small", "lora_r": 4, "lora_alpha": 8}, {"name": "large", "lora_r": 64, "lora_alpha": 32}]
    assert settings_of(write({"grid": {"size": sizes}})) == [{"size": "small"}, {"size": "large"}]
    unnamed = [{"lora_r": 4, "lora_alpha": "=3*lora_r"}, {"lora_r": 8}]
    assert settings_of(write({"grid": {"size": unnamed}})) == [{"lora_r": 4, "lora_alpha": 12}, {"lora_r": 8}]


def test_values_of_a_key_may_be_lists_and_mappings_and_reach_inside(write: Write):
    grid = {
        "lora_target_modules": [["q_proj", "v_proj"], ["up_proj"]],
        "datasets.0.path": ["a/one.jsonl", "b/two.jsonl"],
        "rank_pattern": [{}, {"down_proj": 4}],
    }
    found = runs_of(write({"grid": grid})).runs
    assert len(found) == 8
    assert [run.config.data.datasets[0].path for run in found[:4:2]] == ["a/one.jsonl", "b/two.jsonl"]
    assert found[1].config.adapter.rank_pattern == {"down_proj": 4}
    assert len({run.name for run in found}) == 8
    assert found[1].name.startswith("q+v-path-one.jsonl")


def test_subsets_are_all_combinations_of_parts(write: Write):
    study = read(write({"subsets": {"lora_target_modules": ["q_proj", "k_proj", ["up_proj", "down_proj"]]}}))
    found = expand(study).runs
    assert [run.settings["lora_target_modules"] for run in found] == [
        ["q_proj"], ["k_proj"], ["up_proj", "down_proj"], ["q_proj", "k_proj"], ["q_proj", "up_proj", "down_proj"],
        ["k_proj", "up_proj", "down_proj"], ["q_proj", "k_proj", "up_proj", "down_proj"],
    ]  # fmt: skip
    assert study.subsets["lora_target_modules"][2] == ["up_proj", "down_proj"]


def test_what_is_the_same_is_run_once_and_said(write: Write):
    found = runs_of(write({"grid": {"lora_r": [8, 16], "lora_alpha": [16, "=2*lora_r"]}}))
    assert [run.name for run in found.runs] == ["r8-alpha16", "r16-alpha16", "r16-alpha32"]
    assert "1 of 4 runs have the settings of another and are not repeated: r8-alpha16." in found.notes[0]
    # 16.0 and 16, and a default that is written out, are the same too.
    study = {"grid": {"lora_alpha": [32, 32.0]}, "runs": [{"name": "a"}, {"name": "b", "bf16": "auto"}]}
    assert len(runs_of(write(study)).runs) == 1


def test_a_run_is_known_by_what_it_does(write: Write):
    (one,) = runs_of(write({"grid": {"lora_r": [8]}, "seeds": [1]})).runs
    for same in ("save_steps=9", "wandb_mode=offline wandb_project=x"):
        (other,) = runs_of(write({"grid": {"lora_r": [8]}, "seeds": [1]}), *same.split()).runs
        assert other.key == one.key
    (other,) = runs_of(write({"grid": {"lora_r": [8]}, "seeds": [1]}), "lora_dropout=0.1").runs
    assert other.key != one.key


def test_overrides_change_the_base(write: Write):
    path = write({"grid": {"lora_r": [4, 8]}})
    assert {run.config.training.max_steps for run in runs_of(path, "max_steps=9").runs} == {9}
    assert runs_of(path, "max_steps=9").runs[0].config.origins["max_steps"] == "command line"
    assert "lora_r is what the study varies" in fails(path, "lora_r=3")
    assert "lora_rr" in fails(path, "--lora_rr", "3")
    assert "--output-dir" in fails(path, "output_dir=x")


def test_the_base_may_be_keys_with_expressions_or_another_tools_file(write: Write, tmp_path: Path):
    base = {**BASE, "lora_alpha": "=4*lora_r"}
    found = runs_of(write({"base": base, "grid": {"lora_r": [2, 3]}})).runs
    assert [run.config.adapter.lora_alpha for run in found] == [8, 12]
    axolotl = {**BASE, "flash_attention": False, "xformers_attention": None, "val_set_size": 0.1}
    (tmp_path / "axolotl.yml").write_text(yaml.safe_dump(axolotl))
    asked = write({"base": "axolotl.yml", "grid": {"lora_r": [2, 3]}})
    assert "turns evaluations off" in fails(asked)  # as Axolotl does where nothing asks for them
    assert len(runs_of(asked, "evals_per_epoch=1").runs) == 2


def test_the_base_lies_beside_the_study(write: Write, tmp_path: Path):
    write({"grid": {"lora_r": [2, 3]}})
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "study.yml").rename(inner / "study.yml")
    assert "inner/base.yml: there is no such file" in fails(inner / "study.yml")
    (tmp_path / "base.yml").rename(inner / "base.yml")
    assert len(runs_of(inner / "study.yml").runs) == 2


BAD = [
    ({"gird": {"lora_r": [1]}}, "study.yml:2: gird is not a key of a study. Did you mean grid?"),
    ({"lora_r": [1, 2]}, "lora_r is not a key of a study. It is one of the config"),
    ({}, "nothing is varied"),
    ({"base": None, "seeds": 2}, "base is missing"),
    ({"base": "nowhere.yml", "seeds": 2}, "nowhere.yml: there is no such file"),
    ({"base": 3, "seeds": 2}, "expected a file's name or keys"),
    ({"grid": []}, "grid: expected keys"),
    ({"grid": {"lora_r": []}}, "grid.lora_r: the list is empty"),
    ({"grid": {"lora_rr": [1, 2]}}, "lora_rr is not a key of the config. Did you mean lora_r?"),
    ({"grid": {"lora_r": [8, "many"]}}, "found the text 'many'. [1 of 2 runs: r-many]"),
    ({"grid": {"lora_r": [0, -1]}}, "2 of 2 runs cannot be started"),
    ({"grid": {"output_dir": ["a", "b"]}}, "output_dir is set by the study"),
    ({"runs": {"lora_r": 8}}, "runs: expected a list of settings"),
    ({"runs": [{"name": "a"}, {"name": "a", "lora_r": 3}]}, "runs: two are called a"),
    ({"runs": [{"lora_r": 3, "lora_rr": 3}]}, "lora_rr is not a key"),
    ({"runs": [{}]}, "nothing is set here"),
    ({"runs": [{"lora_r": 3}], "grid": {"lora_r": [1]}}, "lora_r is set by lora_r and by run"),
    ({"seeds": 0}, "seeds: expected how many"),
    ({"seeds": [1, 1]}, "one of them is there twice"),
    ({"seeds": "many"}, "seeds: expected how many"),
    ({"seeds": 2, "grid": {"seed": [1, 2]}}, "seed is set by seed and by seeds"),
    ({"subsets": {"lora_target_modules": []}}, "expected a list of parts"),
    ({"subsets": {"lora_target_modules": ["q_proj", "q_proj"]}}, "there twice"),
    ({"subsets": {"lora_target_modules": [f"m{i}" for i in range(13)]}}, "8,191 combinations"),
    ({"grid": {"lora_r": list(range(1, 200)), "lora_alpha": list(range(1, 200))}}, "39,601 settings"),
    ({"seeds": 2, "metric": "eval_wonder"}, "whether eval_wonder is better small or large is not known: write goal"),
    ({"seeds": 2, "goal": "lower"}, "goal: expected min or max, found 'lower'"),
    ({"seeds": 2, "jobs": 0}, "jobs: expected a whole number of at least 1"),
    ({"seeds": 2, "keep": "nothing"}, "keep: expected all or results or figures"),
    ({"seeds": 2, "trials": 3}, "trials is for a search"),
    ({"seeds": 2, "name": 3}, "name: expected a text"),
    ({"grid": {"lora_alpha": ["=2*lora_q"]}}, "lora_q is not a key of the config. Did you mean lora_r?"),
    ({"grid": {"lora_alpha": ["=2*base_model"]}}, "base_model is 'some/model' in this run, and no number"),
    ({"grid": {"lora_alpha": ["=lora_r/0"]}}, "=lora_r/0 divides by zero"),
    ({"grid": {"lora_alpha": ["=2*lora_r"], "lora_r": ["=lora_alpha/2"]}}, "follows from itself (lora_alpha -> lora_r"),
    ({"grid": {"lora_r": ["=lora_alpha/3"]}}, "lora_r: expected a whole number"),
    ({"grid": {"adapter": ["lora", None]}}, "lora_r does nothing without an adapter"),
    ({"seeds": 2, "base": {**BASE, "val_set_size": 0}}, "there is no validation data"),
    ({"seeds": 2, "base": {**BASE, "evals_per_epoch": 0}}, "`evals_per_epoch: 0` turns evaluations off"),
    ({"grid": {"eval_steps": [5, 6]}, "base": {**BASE, "max_steps": 5}}, "is behind the last step (5)"),
    ({"search": "optima", "space": {"lora_r": [1, 2]}, "trials": 2}, "search: expected optuna"),
    ({"search": "optuna", "space": {"lora_r": [1, 2]}}, "trials is missing"),
    ({"search": "optuna", "trials": 2}, "space is missing"),
    ({"search": "optuna", "trials": 2, "space": {"lora_r": [1, 2]}, "grid": {"seed": [1]}}, "a search chooses them"),
    ({"search": "optuna", "trials": 2, "space": {"lora_r": {"low": 3}}}, "low and high have to be numbers"),
    ({"search": "optuna", "trials": 2, "space": {"lora_r": {"low": 3, "high": 2}}}, "low (3) has to be below"),
    ({"search": "optuna", "trials": 2, "space": {"lora_r": {"low": 1, "high": 2.5}}}, "lora_r is a whole number"),
    ({"search": "optuna", "trials": 2, "space": {"learning_rate": {"low": 0, "high": 1, "log": True}}}, "above 0"),
    ({"search": "optuna", "trials": 2, "space": {"lora_r": {"lo": 1, "high": 2}}}, "lo is none of low, high"),
    ({"search": "optuna", "trials": 2, "space": {"lora_r": [1, 2]}, "seeds": 2}, "each setting with one seed"),
    ({"search": "optuna", "sampler": "grid", "space": {"learning_rate": {"low": 1, "high": 2}}}, "or a step"),
    ({"search": "optuna", "trials": 2, "space": {"lora_dropout": {"low": 0.0, "high": 1.5}}}, "lora_dropout"),
]  # fmt: skip


@pytest.mark.parametrize(("study", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_is_wrong_is_said(study: dict[str, Any], message: str, write: Write):
    from luthier.experiments.study.expand import check_space

    path = write(study)


    def look() -> None:
        asked = read(path)
        (check_space if asked.search else expand)(asked)

    with pytest.raises(ConfigError) as caught:
        look()
    assert message in str(caught.value)


def test_everything_is_said_at_once(write: Write):
    said = fails(write({"metrik": "loss", "seeds": "x", "grid": {"lora_rr": [1]}}))
    assert "3 problems" in said
    assert said.count("study.yml:") == 4


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [\n", "name: x\nname: y\nbase: base.yml\nseeds: 2\n"])
def test_a_file_that_is_no_study(text: str, write: Write, tmp_path: Path):
    write({})
    (tmp_path / "study.yml").write_text(text)
    assert "study.yml" in fails(tmp_path / "study.yml")


def test_there_is_no_such_file(tmp_path: Path):
    assert "there is no such file" in fails(tmp_path / "none.yml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("=2*lora_r", 16), ("=lora_r/2", 4), ("=lora_r/3", 8 / 3), ("=-lora_r % 5 + 2**3", 10), ("=sqrt(lora_r*2)", 4),
     ("=max(lora_r, 64) // 3", 21), ("= 1e-3 * lora_r", 0.008), ("=round(lora_r / 3)", 3)],
)  # fmt: skip
def test_arithmetic(text: str, value: float):
    found = evaluate(text, {"lora_r": 8}.__getitem__)
    assert found == pytest.approx(value)
    assert isinstance(found, int) == float(value).is_integer()


@pytest.mark.parametrize(
    "text",
    ["=__import__('os')", "=lora_r.real", "='a'*3", "=[1]", "=lora_r if 1 else 2", "=True+1", "=9**9**9", "=(-8)**0.5",
     "=2*", "=" + "1+" * 200 + "1", "=max()", "=1e308*10", "=lambda: 1", "=lora_r(2)"],
)  # fmt: skip
def test_nothing_but_arithmetic(text: str):
    with pytest.raises(ExpressionError):
        evaluate(text, {"lora_r": 8}.__getitem__)


def test_a_key_that_names_itself_means_the_base(write: Write):
    assert follows_itself("lora_r", "=2*lora_r")
    assert not follows_itself("lora_r", "=lora_alpha")
    assert settings_of(write({"grid": {"lora_r": ["=lora_r", "=lora_r/2"]}})) == [{"lora_r": 16}, {"lora_r": 8}]


def test_names_are_short_and_fit_for_folders():
    settings = {"learning_rate": 2e-05, "optimizer": "sgd", "peft_use_dora": False}
    assert name_of(settings, 3) == "lr2e-5-sgd-no-peft_use_dora-s3"
    assert name_of({"base_model": "meta/Llama 3", "datasets.0.path": "a/b c.jsonl"}, None) == "Llama_3-path-b_c.jsonl"
    assert name_of({}, None) == "run"
    long = name_of({"lora_target_modules": [f"module{i}" for i in range(30)]}, 0)
    assert len(long) <= 64
    assert long != name_of({"lora_target_modules": [f"module{i}" for i in range(31)]}, 0)
