"""What a study found, in sentences: only what its figures say, and whether they can say it.

The rule by which a difference counts is in `noise`; here it is put into words, with the numbers that it used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.experiments.run_files import Run
from luthier.experiments.sections import clipped, duration
from luthier.experiments.study.distributions import range_quantile
from luthier.experiments.study.effects import of_keys, of_pairs, of_search
from luthier.experiments.study.noise import Comparison
from luthier.experiments.study.results import StudyResult, Trial
from luthier.experiments.study.settings import (
    Group,
    Setting,
    groups_of,
    has_figure,
    named,
    varying,
)
from luthier.experiments.study.words import (
    Finding,
    amount,
    article,
    chance,
    extreme,
    listed,
    metric_name,
    plural,
)
from luthier.experiments.verdict import BAD, GOOD, OPEN

# Failures that are put into words; a table has the rest.
MOST_FAILURES = 3
# Costs, what they are called, and how they are written.
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("seconds", "time", duration),
    ("peak_memory_gib", "memory", lambda number: f"{number:.2f} GiB"),
    ("trainable_parameters", "trainable parameters", lambda number: f"{number:,.0f}"),
)
# A saving that is worth a word.
_SAVING = 0.03


def findings(result: StudyResult, runs: dict[str, Run] | None = None) -> list[Finding]:
    """All that the figures say. `runs`: the run folders by trial, which tell what was measured alike."""
    groups = groups_of(result, runs or {})
    return findings_of(result, [Comparison(group, result.subsets) for group in groups])


def findings_of(result: StudyResult, comparisons: Sequence[Comparison]) -> list[Finding]:
    found = []
    if len(comparisons) > 1:
        found.append(_measured_apart(result, comparisons))
    for compared in comparisons:
        if len(compared.settings) < 2 and len(comparisons) > 1:
            continue
        said = [_best(result, compared), *_whole(result, compared)]
        said += [*of_keys(result, compared), *of_pairs(compared), *of_search(result, compared)]
        said += _cost(compared)
        why = compared.group.why
        found += [Finding(f"{each.about} ({why})", each.text, each.mood) if why else each for each in said]
    if not comparisons:
        found.append(Finding("Best", f"No run has {article(metric_name(result))} yet."))
    found += _missing(result)
    return found


def headline(result: StudyResult, comparisons: Sequence[Comparison]) -> str:
    """The answer in a sentence."""
    if not comparisons:
        return f"No run has {article(metric_name(result))} yet."
    if len(comparisons) > 1:
        return f"{metric_name(result).capitalize()} is not of the same measure in all runs: they are ranked in groups."
    compared = comparisons[0]
    settings, form = compared.settings, compared.group.form
    best = f"{compared.group.name_of(settings[0])} has the {extreme(result)} {metric_name(result)}"
    if len(settings) < 2:
        return f"One setting: {metric_name(result)} {amount(settings[0], form)}."
    if compared.difference(settings[1]).beyond is None:
        return f"{best}, {amount(settings[0], form)}, but with one seed that may be luck."
    if not compared.differs:
        return f"No setting can be told from another: {metric_name(result)} differs no more than by luck."
    alike = sum(not compared.difference(setting).beyond for setting in settings[1:])
    if not alike:
        return f"{best}, {amount(settings[0], form)}: better than the others beyond the noise."
    others = plural(alike, "other setting")
    return f"{best}, {amount(settings[0], form)}; {others} of {len(settings) - 1} cannot be told from it."


def as_markdown(result: StudyResult, found: Sequence[Finding]) -> str:
    """The same sentences for a document."""
    lines = [f"# {result.name}", ""]
    lines += [result.question, ""] if result.question else []
    lines += [f"- **{each.about}.** {each.text}" for each in found]
    lines += ["", *(f"- {note}" for note in result.notes)] if result.notes else []
    return "\n".join(lines).rstrip() + "\n"


def _measured_apart(result: StudyResult, comparisons: Sequence[Comparison]) -> Finding:
    parts = "; ".join(plural(len(each.settings), "setting") + f" with {each.group.why}" for each in comparisons)
    text = (
        f"{metric_name(result).capitalize()} is not of the same measure in all runs, which are ranked only among those "
        f"measured alike: {parts}."
    )
    if all(len(each.settings) < 2 for each in comparisons):
        text += " No two settings were measured alike, so none is better than another by it."
    return Finding("Not comparable", text, BAD)


def _best(result: StudyResult, compared: Comparison) -> Finding:
    group, settings = compared.group, compared.settings
    form = group.form
    best = settings[0]
    seeds = f" (mean and standard deviation over {len(best.trials)} seeds)" if len(best.trials) > 1 else ""
    text = f"{group.name_of(best)} has the {extreme(result)} {metric_name(result)}: {amount(best, form)}{seeds}."
    if len(settings) < 2:
        return _one_setting(result, best, form)
    runner = settings[1]
    gap = compared.difference(runner)
    lost = [trial for trial in result.trials if _is_lost(trial, best)]
    if lost:
        are = "is" if len(lost) == 1 else "are"
        text += f" {plural(len(lost), 'run')} of this setting ended without a figure, and {are} not in it."
    text += f" The next is {group.name_of(runner)} with {amount(runner, form)}: "
    if gap.beyond is None:
        single = all(len(setting.trials) == 1 for setting in settings)
        why = "one seed for each setting" if single else "one seed for one of them"
        return Finding("Best", f"{text}{form(gap.size)} apart. With {why}, that cannot be told from luck.")
    if gap.beyond:
        text += f"{form(gap.size)} apart, which is beyond the noise (it takes {form(gap.least or 0)})."
        return Finding("Best", text, GOOD)
    alike = [setting for setting in settings[1:] if not compared.difference(setting).beyond]
    needs = f" (it takes {form(gap.least or 0)})" if gap.least and gap.size <= gap.least else ""
    text += f"{form(gap.size)} apart, which is within the noise{needs}."
    if len(alike) == len(settings) - 1:
        others = "None of the other settings can be told from the best." if len(settings) > 2 else ""
    else:
        others = f"{plural(len(alike), 'setting')} of the other {len(settings) - 1} cannot be told from the best."
    return Finding("Best", f"{text} {others}".strip())


def _is_lost(trial: Trial, setting: Setting) -> bool:
    """Whether it is a run of this setting that failed or diverged: the mean of the others flatters the setting."""
    same = all(trial.settings.get(key) == given for key, given in setting.values.items() if key in trial.settings)
    return same and trial.status in ("failed", "finished") and not has_figure(trial)


def _one_setting(result: StudyResult, setting: Setting, form: Callable[[float], str]) -> Finding:
    """A study of seeds alone: how far runs of the same setting lie apart."""
    numbers = setting.numbers
    if keys := varying(result.varied, result.trials):
        found = f"{metric_name(result)} {amount(setting, form)}"
        return Finding("Best", f"{named(setting.values, keys)} is the only setting with a figure: {found}.")
    if setting.spread is None:
        return Finding("Best", f"There is one run only: {metric_name(result)} {form(numbers[0])}.")
    # Student's t of two groups is the studentized range of two, by the root of two; so is the error of a difference.
    least = range_quantile(2, len(numbers) - 1) * setting.spread
    text = (
        f"Seeds alone give {article(metric_name(result))} of {amount(setting, form)} (mean and standard deviation "
        f"over {len(numbers)} seeds), from {form(min(numbers))} to {form(max(numbers))}. Two settings with one run "
        f"each would have to differ by {form(least)} to be told apart (95%)."
    )
    return Finding("Spread", text)


def _whole(result: StudyResult, compared: Comparison) -> list[Finding]:
    """Whether the settings differ at all, and by which rule that is judged."""
    noise = compared.noise
    if len(compared.settings) < 2:
        return []
    form = compared.group.form
    if compared.luck is None or compared.differs is None:
        first, last = compared.settings[0], compared.settings[-1]
        return [
            Finding(
                "Noise",
                f"One seed for each setting: differences between them, {form(abs(first.mean - last.mean))} from first "
                "to last, cannot be told from luck. More seeds (`seeds: 3`) would tell.",
                BAD,
            )
        ]
    luck = chance(compared.luck)
    if noise.source == "own":
        spreads = [setting.spread for setting in compared.settings if setting.spread is not None]
        rule = (
            f"The spread over seeds differs from setting to setting ({form(min(spreads))} to {form(max(spreads))}), so "
            "each pair is judged by its own (Games and Howell's test, 5%)"
        )
        if loud := [compared.group.name_of(each) for each in compared.settings if each not in compared.calm.settings]:
            rule += f"; what is averaged over settings leaves out those that vary most: {'; '.join(loud)}"
    elif noise.source == "rest":
        rule = (
            "One seed for each setting: single settings cannot be told from luck. The effects of keys can be set "
            f"against what they leave unexplained together ({form(noise.spread)} for one run)"
        )
    else:
        paired = ", seed by seed" if noise.source == "same seeds" else ""
        rule = (
            f"Seeds alone make runs of one setting differ by {form(noise.spread)} (standard deviation{paired}); pairs "
            "of settings are judged by Tukey's test over all pairs, at 5%"
        )
    if compared.group.by_seed:
        rule += "; each seed draws held-out data of its own"
        rule += "" if noise.source == "same seeds" else ", which is part of that spread"
    if compared.differs:
        return [Finding("Noise", f"{rule}. The settings differ by more than that ({luck} by luck).", GOOD)]
    return [
        Finding("Noise", f"{rule}. The settings as a whole differ no more than by luck ({luck}): no winner.", OPEN)
    ]


def _cost(compared: Comparison) -> list[Finding]:
    """What the best costs, and what is cheaper and as good as far as can be told."""
    settings = compared.settings
    best = settings[0]
    has = [(figure, form(cost)) for figure, _, form in COSTS if (cost := best.cost(figure)) is not None]
    if not has or len(settings) < 2:
        return []
    shown = dict(has)
    parts = [shown[figure] for figure in ("seconds", "peak_memory_gib") if figure in shown]
    if (count := best.cost("trainable_parameters")) is not None:
        total = best.cost("total_parameters")
        share = f" ({100 * count / total:.3g}% of all)" if total else ""
        parts.append(f"{shown['trainable_parameters']} trainable parameters{share}")
    text = f"The best setting takes {listed(parts)}."
    told = [compared.difference(setting).beyond for setting in settings]
    if all(each is None for each in told[1:]):
        cheapest = _cheapest(compared.group, settings)
        return [Finding("Cost", " ".join([text, *cheapest]))]
    alike = [setting for setting, beyond in zip(settings, told, strict=True) if beyond is False or setting is best]
    cheaper = _cheapest(compared.group, alike)
    if not cheaper and len(alike) > 1:
        text += " None of those that cannot be told from it is much cheaper."
    elif cheaper:
        text += f" Of those that cannot be told from it, {' '.join(cheaper)}"
    return [Finding("Cost", text)]


def _cheapest(group: Group, settings: Sequence[Setting]) -> list[str]:
    """The cheapest in each cost, where it saves something."""
    best = settings[0]
    found: dict[str, list[str]] = {}
    at: dict[str, Setting] = {}
    for figure, name, shown in COSTS:
        there = [(cost, place) for place, setting in enumerate(settings) if (cost := setting.cost(figure)) is not None]
        own = best.cost(figure)
        if own is None or not there:
            continue
        least, place = min(there)
        if least < (1 - _SAVING) * own:
            label = group.name_of(settings[place])
            at[label] = settings[place]
            found.setdefault(label, []).append(f"{name} {shown(least)} ({least / own - 1:+.0%})")
    said = []
    for label, parts in found.items():
        gap = group.form(abs(at[label].mean - best.mean))
        said.append(f"{label} takes the least {listed(parts)}, and is {gap} worse.")
    return said


def _missing(result: StudyResult) -> list[Finding]:
    """Runs without a figure."""
    found = []
    failed = [trial for trial in result.trials if trial.status == "failed"]
    if failed:
        first = "; ".join(f"{trial.name}: {_last_line(trial)}" for trial in failed[:MOST_FAILURES])
        more = f"; and {len(failed) - MOST_FAILURES} more" if len(failed) > MOST_FAILURES else ""
        found.append(Finding("Failed", f"{plural(len(failed), 'run')} of {len(result.trials)}: {first}{more}.", BAD))
    empty = [trial.name for trial in result.trials if trial.status == "finished" and not has_figure(trial)]
    if empty:
        names = ", ".join(empty[:MOST_FAILURES]) + (" and more" if len(empty) > MOST_FAILURES else "")
        text = f"{plural(len(empty), 'run')} ended without a finite {metric_name(result)} and are not ranked: {names}."
        found.append(Finding("No figure", text if len(empty) > 1 else text.replace(" are ", " is "), BAD))
    waiting = sum(trial.status == "waiting" for trial in result.trials)
    if waiting:
        found.append(Finding("Unfinished", f"{plural(waiting, 'run')} of {len(result.trials)} not done yet."))
    return found


def _last_line(trial: Trial) -> str:
    lines = [line.strip() for line in trial.error.splitlines() if line.strip()]
    if not lines:
        return "it says nothing of why"
    return "`" + clipped(lines[-1].replace("`", "'"), 200) + "`"

