"""What counts as a difference: tails against scipy or draws, and how often a study of noise claims something."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.experiments.study.distributions import chi2_upper, f_upper, range_quantile, range_upper
from luthier.experiments.study.findings import GOOD, findings, findings_of, headline
from luthier.experiments.study.noise import holm
from luthier.experiments.study.results import StudyResult, Trial
from tests.experiments.study.made import judged, said, study, subsets


@pytest.mark.slow  # for what scipy takes to load
def test_tails_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for value, above, below in ((3.0, 2, 6), (1.0, 5, 100), (40.0, 1, 2), (2.5, 63, 126), (0.2, 3, 3)):
        assert f_upper(value, above, below) == pytest.approx(stats.f.sf(value, above, below), rel=1e-9)
    for value, groups, freedom in ((3.9, 3, 10), (6.0, 64, 126), (8.0, 5, 2), (5.0, 3, 4.5), (17.97, 2, 1)):
        expected = stats.studentized_range.sf(value, groups, freedom)
        assert range_upper(value, groups, freedom) == pytest.approx(expected, rel=0.01)
    assert chi2_upper(15.0, 5) == pytest.approx(stats.chi2.sf(15.0, 5), rel=0.05)


def test_tails_are_those_of_draws():
    draws = np.random.default_rng(0)
    means, spread = draws.normal(size=(200_000, 5)), np.sqrt(draws.chisquare(8, size=200_000) / 8)
    share = float((np.ptp(means, axis=1) / spread > range_quantile(5, 8.0)).mean())
    assert share == pytest.approx(0.05, abs=0.003)  # three standard errors are 0.0015
    ratio = draws.chisquare(3, size=200_000) / 3 / (draws.chisquare(7, size=200_000) / 7)
    assert f_upper(3.0, 3, 7) == pytest.approx(float((ratio > 3.0).mean()), abs=0.003)
    # Of two groups it is Student's t: with many degrees of freedom 1.96 standard errors of a difference.
    assert range_quantile(2, 1e5) / math.sqrt(2) == pytest.approx(1.96, abs=0.005)


@pytest.mark.parametrize(
    ("grid", "more"),
    [
        ({"lora_r": [8, 16], "optimizer": ["adamw", "sgd", "lion"]}, {"seeds": 2}),
        pytest.param({"lora_r": [8, 16, 32, 64]}, {"seeds": 3}, marks=pytest.mark.slow),
        pytest.param({"adapter": ["lora", "qlora"]}, {"seeds": 4, "of_seed": 0.1}, marks=pytest.mark.slow),
        pytest.param(
            {"lora_r": [8, 16, 32, 64], "lora_alpha": [1, 2, 4, 8]}, {"seeds": 1}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_study_of_noise_claims_a_difference_in_one_of_twenty(grid: dict[str, list[Any]], more: dict[str, Any]):
    studies = 200
    claims = 0
    for draw in range(studies):
        result = study(grid, draw=draw, **more)
        compared = judged(result)
        marked = any(compared.difference(setting).beyond for setting in compared.settings)
        worded = [each for each in findings_of(result, [compared]) if each.mood == GOOD]
        assert bool(compared.differs) or not (marked or worded)
        claims += bool(marked or worded)
    # 0.05 and three standard errors of so many studies
    assert claims / studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_an_effect_of_five_times_the_noise_is_found():
    """Three seeds are enough for it, nearly always: the rule is not one that never finds anything."""
    found = 0
    for draw in range(60):
        compared = judged(study({"lora_r": [8, 16, 32]}, lambda lora_r: 1 - 0.05 * (lora_r == 32), draw=draw))
        found += compared.settings[0].values["lora_r"] == 32 and bool(compared.difference(compared.settings[1]).beyond)
    assert found >= 50


def test_a_strong_effect_is_found_and_told():
    result = study({"lora_r": [8, 16, 32, 64]}, lambda lora_r: 1 - 0.1 * math.log2(lora_r / 8))
    text = said(result)
    assert text["Best"].startswith("lora_r 64 has the lowest eval loss: 0.7")
    assert "beyond the noise" in text["Best"] and "p < 0.001" in text["Noise"]
    assert "falling with each step up" in text["lora_r"]
    assert "Worse than the best beyond the noise: 8, 16, 32." in text["lora_r"]
    assert headline(result, [judged(result)]).endswith("better than the others beyond the noise.")


def test_a_tie_is_called_one_and_what_is_cheaper_is_named():
    result = study({"lora_r": [8, 16, 32, 64]}, lambda lora_r: 1.0 + (0.5 if lora_r == 64 else -1e-6 * lora_r), draw=1)
    compared = judged(result)
    beyond = {setting.values["lora_r"]: compared.difference(setting).beyond for setting in compared.settings}
    assert beyond.pop(64) is True and not any(beyond.values())
    text = said(result)
    assert "within the noise" in text["Best"] and "2 settings of the other 3 cannot be told" in text["Best"]
    if compared.settings[0].values["lora_r"] != 8:
        assert "Of those that cannot be told from it, lora_r 8 takes the least time" in text["Cost"]


def test_the_best_of_a_metric_that_should_be_large():
    result = study({"lora_r": [8, 16]}, lambda lora_r: lora_r / 100, metric="accuracy", goal="max")
    assert said(result)["Best"].startswith("lora_r 16 has the highest accuracy: 0.1")


def test_what_a_seed_does_to_all_settings_alike_is_no_noise():
    """With shifts of ten times the difference, settings are told apart seed by seed."""
    result = study({"adapter": ["lora", "qlora"]}, lambda adapter: 1 + 0.02 * (adapter == "qlora"),
                   seeds=4, noise=0.002, of_seed=0.2)  # fmt: skip
    compared = judged(result)
    assert compared.noise.source == "same seeds" and compared.noise.spread < 0.01
    assert compared.settings[0].values == {"adapter": "lora"} and compared.difference(compared.settings[1]).beyond
    for trial in result.trials:  # the same figures, but the seeds of one setting are others
        trial.seed = (trial.seed or 0) + 10 * (trial.settings["adapter"] == "lora")
    assert judged(result).noise.source == "seeds" and not judged(result).differs


def test_a_setting_that_diverges_does_not_hide_the_others():
    luck = random.Random(0)
    result = study({"learning_rate": [1e-4, 1e-3, 1e-1]}, lambda learning_rate: 1.0 + 0.2 * (learning_rate == 1e-4))
    for trial in result.trials:
        if trial.settings["learning_rate"] == 1e-1:
            trial.metric = 5 + luck.uniform(0, 6)
    compared = judged(result)
    assert compared.noise.source == "own"
    told = {setting.values["learning_rate"]: compared.difference(setting).beyond for setting in compared.settings}
    assert compared.settings[0].values["learning_rate"] == 1e-3 and told[1e-4]
    assert "each pair is judged by its own" in said(result)["Noise"]


def test_a_setting_that_diverges_is_left_out_where_keys_are_averaged():
    luck = random.Random(0)
    truth = {1e-4: 1.2, 1e-3: 1.0, 1e-1: 9.0}
    result = study({"lr": list(truth), "optimizer": ["adamw", "sgd"]}, lambda lr, optimizer: truth[lr])
    for trial in result.trials:
        if trial.settings["lr"] == 1e-1:
            trial.metric = 5 + luck.uniform(0, 9)
    compared = judged(result)
    effects = {effect.factor.name: effect for effect in compared.effects}
    assert effects["lr"].factor.levels == ["0.0001", "0.001"] and effects["lr"].clear
    assert not effects["optimizer"].clear and compared.interactions() == []
    left_out = said(result)["Noise"].split("those that vary most: ")[1]
    assert all(f"lr 0.1, optimizer {name}" in left_out for name in ("adamw", "sgd"))


def test_seeds_without_any_effect():
    result = study({"lora_r": [8, 16]}, lambda lora_r: lora_r / 10, noise=0.0)
    assert judged(result).difference(judged(result).settings[1]).beyond is True
    assert judged(study({"lora_r": [8, 16]}, noise=0.0)).differs is False


def test_one_seed_tells_nothing_of_single_settings():
    text = said(study({"lora_r": [8, 16, 32]}, lambda lora_r: 1 / lora_r, seeds=1))
    assert "One seed for each setting" in text["Noise"] and "cannot be told from luck" in text["Best"]
    assert "with one seed that cannot be told from luck" in text["lora_r"]
    assert "p " not in " ".join(text.values()).replace("up ", "")


def test_keys_are_judged_averaged_over_the_rest():
    result = study(
        {"optimizer": ["adamw", "sgd"], "lora_r": [8, 16, 32]}, lambda optimizer, lora_r: 1 + 0.3 * (optimizer == "sgd")
    )
    effects = {effect.factor.name: effect for effect in judged(result).effects}
    assert effects["optimizer"].clear and not effects["lora_r"].clear
    for level, mean in zip(effects["optimizer"].factor.levels, effects["optimizer"].means, strict=True):
        own = [trial.metric or 0.0 for trial in result.trials if trial.settings["optimizer"] == level]
        assert mean == pytest.approx(float(np.mean(own)))
    text = said(result)
    assert "adamw is best" in text["optimizer"] and "beyond the noise" in text["optimizer"]
    assert "no more than noise" in text["lora_r"]


def test_keys_that_depend_on_each_other_are_told():
    truth = {("adamw", 1e-4): 1.0, ("adamw", 1e-2): 2.0, ("sgd", 1e-4): 2.0, ("sgd", 1e-2): 1.0}
    result = study({"optimizer": ["adamw", "sgd"], "lr": [1e-4, 1e-2]}, lambda optimizer, lr: truth[optimizer, lr])
    assert "lr 0.0001 at optimizer adamw and lr 0.01 at optimizer sgd" in said(result)["Together"]
    alone = study({"optimizer": ["adamw", "sgd"], "lr": [1e-4, 1e-2]}, lambda optimizer, lr: lr + (optimizer == "sgd"))
    assert "Together" not in said(alone)


def test_rank_and_alpha_are_judged_by_their_ratio():
    result = study({"lora_r": [8, 16, 32], "lora_alpha": [1, 2, 4]}, lambda lora_r, lora_alpha: 1 + abs(lora_alpha - 2))
    for trial in result.trials:
        trial.settings = trial.settings | {"lora_alpha": trial.settings["lora_r"] * trial.settings["lora_alpha"]}
    effects = {effect.factor.name: effect for effect in judged(result).effects}
    assert set(effects) == {"lora_r", "lora_alpha / lora_r"}
    ratio = effects["lora_alpha / lora_r"]
    assert ratio.factor.levels[ratio.means.index(min(ratio.means))] == "2" and ratio.clear
    assert not effects["lora_r"].clear


def test_what_each_member_of_a_subset_adds():
    """Even with one run for each combination: the rest of the 63 is the noise. The effects are the true ones."""
    truth = [-0.05, 0.0, -0.08, -0.03, -0.1, 0.0]
    result = subsets(0, truth)
    compared = judged(result)
    assert compared.noise.source == "rest" and compared.noise.spread == pytest.approx(0.01, rel=0.3)
    for effect, expected in zip(compared.effects, truth, strict=True):
        assert effect.means[1] - effect.means[0] == pytest.approx(expected, abs=0.01)
        assert effect.clear == (expected != 0.0)
    text = said(result)
    assert text["Members"].count("better") + text["Members"].count("worse") == 6
    assert "Beyond the noise is the effect of gate_proj + up_proj, v_proj, q_proj, o_proj;" in text["Members"]
    assert sum(bool(judged(subsets(draw, [0.0] * 6)).differs) for draw in range(60)) <= 8


def test_probabilities_are_corrected_for_how_many_there_are():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_runs_without_a_figure_are_told_and_not_ranked():
    result = study({"lora_r": [8, 16]}, lambda lora_r: lora_r / 10)
    failed, diverged, waiting, *_ = result.trials
    failed.status, failed.metric, failed.error = "failed", None, "Traceback\nRuntimeError: out of `memory`\n"
    diverged.metric = math.nan
    waiting.status, waiting.metric = "waiting", None
    text = said(result)
    assert text["Failed"] == "1 run of 6: 0-s0: `RuntimeError: out of 'memory'`."
    assert "1 run ended without a finite eval loss and is not ranked: 0-s1." in text["No figure"]
    assert "1 run of 6 not done yet" in text["Unfinished"]
    assert text["Best"].startswith("lora_r 16 is the only setting with a figure: eval loss 1.5")


def test_a_mean_without_the_runs_that_failed_says_so():
    result = study({"lora_r": [8, 16]}, lambda lora_r: lora_r / 10)
    result.trials[0].status, result.trials[0].metric = "failed", None
    assert "1 run of this setting ended without a figure, and is not in it." in said(result)["Best"]


def test_a_study_of_seeds_alone_says_what_they_do():
    text = said(study({}, seeds=5))
    assert "(mean and standard deviation over 5 seeds)" in text["Spread"]
    assert "would have to differ by 0.0" in text["Spread"]


def test_a_search_says_where_its_best_lay():
    luck = random.Random(0)
    trials = []
    for place in range(20):
        rate = 10 ** luck.uniform(-5, -2)
        loss = abs(math.log10(rate) + 3.5)
        trials.append(Trial(f"t{place}", {"learning_rate": rate}, status="finished", metric=loss))
    trials.append(Trial("t20", {"learning_rate": 1e-9}, status="pruned"))
    result = StudyResult("s", "", "eval_loss", "min", ["learning_rate"], trials, Path(), search=True)
    text = " ".join(each.text for each in findings(result))
    assert "Of 20 finished trials, number" in text and "1 trial stopped early" in text
    assert "The best quarter of the trials has values from" in text


def test_nothing_is_said_of_nothing():
    result = StudyResult("s", "", "eval_loss", "min", ["lora_r"], [Trial("a", {"lora_r": 8})], Path())
    assert said(result) == {"Best": "No run has an eval loss yet.", "Unfinished": "1 run of 1 not done yet."}
    assert headline(result, []) == "No run has an eval loss yet."
