"""What the keys of a study do, in sentences: each by itself, two together, and where a search found its best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.experiments.study.noise import Comparison, Effect, Factor, is_monotone
from luthier.experiments.study.results import StudyResult
from luthier.experiments.study.settings import has_figure, is_numeric, levels, value
from luthier.experiments.study.words import Finding, amount, chance, enumerated, listed, metric_name, plural
from luthier.experiments.verdict import GOOD

# Effects and interactions that are put into words; tables and drawings have the rest.
MOST_EFFECTS, MOST_INTERACTIONS = 8, 3
# Part of a search's trials that counts as its best, and trials from which on that says something.
_QUARTER, _SOME_TRIALS = 0.25, 8


def of_keys(result: StudyResult, compared: Comparison) -> list[Finding]:
    """Of each key; parts of subsets together, the largest first."""
    form = compared.group.form
    found = []
    effects = compared.effects
    parts = [effect for effect in effects if effect.factor.part]
    keys = [effect for effect in effects if not effect.factor.part]
    if len(compared.group.dials) == 1 and not parts:
        # Where a search went is no effect: `of_search` tells it.
        found += [] if result.search or not compared.factors else [_one_key(result, compared, form)]
    else:
        keys.sort(key=lambda effect: 1.0 if effect.luck is None else effect.luck)
        found += [_effect(result, effect, form) for effect in keys[:MOST_EFFECTS]]
    if parts:
        found.append(_parts(result, compared, parts, form))
    return found


def _effect(result: StudyResult, effect: Effect, form: Callable[[float], str]) -> Finding:
    factor = effect.factor
    order = sorted(range(len(effect.means)), key=lambda i: effect.means[i], reverse=result.goal == "max")
    best, worst = order[0], order[-1]
    size = form(abs(effect.means[best] - effect.means[worst]))
    text = (
        f"Averaged over the rest, {factor.levels[best]} is best ({form(effect.means[best])}) and "
        f"{factor.levels[worst]} worst ({form(effect.means[worst])}), {size} apart"
    )
    if effect.clear is None:
        return Finding(factor.name, f"{text}; with one seed that cannot be told from luck.")
    if not effect.clear:
        return Finding(factor.name, f"{text}: no more than noise ({chance(effect.luck or 1.0)}).")
    text += f": beyond the noise ({chance(effect.luck or 0.0)})."
    if factor.numeric and len(order) > 2 and (way := is_monotone(effect.means)):
        text += f" {metric_name(result).capitalize()} {'rises' if way > 0 else 'falls'} with each step up."
    if (alike := [factor.levels[i] for i in effect.alike if i != best]) and len(order) > 2:
        text += f" Not to be told from the best value: {enumerated(alike)}."
    return Finding(factor.name, text, GOOD)


def _one_key(
    result: StudyResult, compared: Comparison, form: Callable[[float], str]
) -> Finding:
    """Of the only key: its settings are its values."""
    settings, factor = compared.settings, compared.factors[0]
    key = factor.name
    best, worst = settings[0], settings[-1]
    text = (
        f"From {value(worst.values.get(key))} ({amount(worst, form)}) to {value(best.values.get(key))} "
        f"({amount(best, form)}) {metric_name(result)} changes by {form(abs(best.mean - worst.mean))}"
    )
    if compared.differs is None:
        return Finding(key, f"{text}; with one seed that cannot be told from luck.")
    beyond = [setting for setting in settings[1:] if compared.difference(setting).beyond]
    if not beyond:
        return Finding(key, f"{text}: no value can be told from the best one.")
    means = [settings[factor.codes.index(place)].mean for place in range(len(factor.levels))]
    if factor.numeric and len(means) > 2 and (way := is_monotone(means)):
        text += f", {'rising' if way > 0 else 'falling'} with each step up"
    worse = sorted(beyond, key=lambda setting: factor.levels.index(value(setting.values.get(key))))
    alike = [setting for setting in settings[1:] if setting not in beyond]
    text += f". Worse than the best beyond the noise: {enumerated([value(each.values.get(key)) for each in worse])}."
    if alike:
        text += f" Not to be told from it: {enumerated([value(each.values.get(key)) for each in alike])}."
    return Finding(key, text, GOOD)


def _parts(
    result: StudyResult, compared: Comparison, effects: Sequence[Effect], form: Callable[[float], str]
) -> Finding:
    """What each member of a subset adds."""
    better = 1 if result.goal == "max" else -1
    gains = sorted(((better * (e.means[1] - e.means[0]), e) for e in effects), key=lambda each: -each[0])
    told = [f"{e.factor.name} {form(abs(gain))} {'better' if gain >= 0 else 'worse'}" for gain, e in gains]
    clear = [e.factor.name for _, e in gains if e.clear]
    text = f"{metric_name(result).capitalize()} with a member and without it, the others the same: {', '.join(told)}."
    if compared.differs is None:
        return Finding("Members", f"{text} With one seed that cannot be told from luck.")
    if not clear:
        return Finding("Members", f"{text} None of that is more than noise.")
    rest = "; that of the others is not" if len(clear) < len(gains) else ""
    return Finding("Members", f"{text} Beyond the noise is the effect of {', '.join(clear)}{rest}.", GOOD)


def of_pairs(compared: Comparison) -> list[Finding]:
    found = []
    for one, other, luck in compared.interactions()[:MOST_INTERACTIONS]:
        if len(one.levels) > len(other.levels):
            one, other = other, one
        best = best_within(compared, one, other)
        text = f"The effects of {one.name} and {other.name} depend on each other ({chance(luck)}): "
        if len(set(best.values())) > 1:
            where = [f"{_level(other, b)} at {_level(one, a)}" for a, b in best.items()]
            text += f"best is {listed(where)}."
        else:
            text += f"{_level(other, next(iter(best.values())))} is best throughout, but not by the same margin."
        found.append(Finding("Together", text, GOOD))
    return found


def _level(factor: Factor, level: str) -> str:
    return f"{level} {factor.name}" if factor.part else f"{factor.name} {level}"


def best_within(compared: Comparison, one: Factor, other: Factor) -> dict[str, str]:
    """For each level of one factor, the level of the other one with the best mean."""
    found = {}
    for place, level in enumerate(one.levels):
        means = []
        for code in range(len(other.levels)):
            there = [
                setting.mean
                for setting, a, b in zip(compared.settings, one.codes, other.codes, strict=True)
                if a == place and b == code
            ]
            means.append(sum(there) / len(there))
        best = max(means) if compared.group.goal == "max" else min(means)
        found[level] = other.levels[means.index(best)]
    return found


def of_search(result: StudyResult, compared: Comparison) -> list[Finding]:
    """Where a search found its best, of the keys that it turned freely."""
    settings = compared.settings
    known = {factor.name for factor in compared.factors if not result.search or len(compared.group.dials) > 1}
    free = [key for key in compared.group.dials if is_numeric(key, settings) and key not in known]
    found = []
    if result.search:
        done = [trial for trial in result.trials if has_figure(trial)]
        place = [trial.name for trial in done].index(settings[0].trials[0].name) + 1
        pruned = sum(trial.status == "pruned" for trial in result.trials)
        early = f"; {plural(pruned, 'trial')} stopped early" if pruned else ""
        found.append(
            Finding("Search", f"Of {plural(len(done), 'finished trial')}, number {place} is the best{early}.")
        )
    if len(settings) >= _SOME_TRIALS:
        top = settings[: max(2, round(_QUARTER * len(settings)))]
        for key in free[:MOST_EFFECTS]:
            all_of, best_of = levels(key, settings), levels(key, top)
            if len(all_of) > 1:
                text = (
                    f"The best quarter of the trials has values from {value(best_of[0])} to {value(best_of[-1])}; "
                    f"tried were {value(all_of[0])} to {value(all_of[-1])}."
                )
                found.append(Finding(key, text))
    return found
