"""What the figures of a preference run mean, in words, once each.

Logged rows are noisy: a row may be the mean of a handful of pairs. They are averaged into points, each of enough
answers and steps to be compared with the next; an evaluation is a point by itself, since it is always of the same
data. A few rules look at the last points, and each has a say once in a run. What the watch knows is a plain dict
that goes into the checkpoint, so that a resumed run neither forgets nor repeats.

Rewards are those of the rows: beta times the log ratio of a whole answer to the reference, or, where a method has
none (`orpo`, `simpo`), beta times the mean log-prob of a token; the latter are read against the run's first point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import exp, isfinite, log, sqrt
from typing import Any

from luthier.config.preference import has_reference

Row = Mapping[str, Any]
Point = dict[str, float]

LOSS, KL, RATE, NORM = "loss", "kl", "learning_rate", "grad_norm"
CHOSEN, REJECTED = "rewards/chosen", "rewards/rejected"
MARGIN, ACCURACY = "rewards/margins", "rewards/accuracies"
_READ = (LOSS, KL, RATE, NORM, CHOSEN, REJECTED, MARGIN, ACCURACY)

# A point has at least so many of each: an accuracy over 100 pairs has a standard error of 0.05, one over three such
# points 0.03; over fewer steps, what is seen may be what one batch did.
ANSWERS, STEPS = 100, 10
# Points that make a finding; evaluations are rarer, and differ by the model alone.
_SEVERAL, _SEVERAL_HELD_OUT = 3, 2
_KEPT = 8

# Rewards: a margin of 0.01 is a loss within 0.005 of where it begins, and odds of 1.01 to 1.
_NOTHING = 0.01
# Half a unit of reward off chosen answers: at beta 0.1 five nats each, which makes them 150 times less likely. Less
# than that, or than a quarter of the margin, is what a healthy run pays for pushing the rejected ones down.
_FALL, _SHARE_OF_MARGIN = 0.5, 0.25
# Without a reference: a quarter of a nat per token, a perplexity up by 28%, and ten standard errors of a point.
_FALL_PER_TOKEN = 0.25
# No loss asks for rewards as far as this: at a margin of 10 the slope of a sigmoid is 0.00005.
_RUNAWAY = 10.0
_RUNAWAY_PER_TOKEN = 3.0
# A margin that was worth losing (odds of 1.1 to 1; without a reference, 0.1 nats per token), and what is left of it.
_WORTH, _LEFT = 0.1, 0.1
# An accuracy is another than a coin's from three standard errors on, each 0.5 / sqrt(pairs).
_COIN, _ERRORS = 0.5, 3
# beta times KL: at beta 0.1 fifty nats, on answers that nobody asks to be likelier. An answer that does not rise with
# them has a slope of 0.007 left in the loss.
_FAR = 5.0


@dataclass(frozen=True)
class _View:
    """What a rule looks at.

    Attributes:
        answers: of a point of training, at least; of an evaluation.
        first: the first point of all. points: the last ones after warm-up, the newest at the end.
        best_margin, best_accuracy: highest means over `several` successive points, since warm-up.
    """

    method: str
    kind: str
    beta: float
    held_out: bool
    answers: int
    total_steps: int
    first: Point
    points: list[Point]
    best_margin: float
    best_accuracy: float

    @property
    def several(self) -> int:
        return _SEVERAL_HELD_OUT if self.held_out else _SEVERAL

    @property
    def noise(self) -> float:
        """Of an accuracy over `several` points."""
        return _ERRORS * 0.5 / sqrt(self.answers * (1 if self.held_out else self.several))

    @property
    def refers(self) -> bool:
        return has_reference(self.method)

    @property
    def unit(self) -> float:
        """Of reward: 1, or without a reference that of one nat per token."""
        return 1.0 if self.refers else self.beta

    @property
    def where(self) -> str:
        return f"step {self.points[-1]['step']:.0f}{', held-out data' if self.held_out else ''}"

    def last(self, count: int, *names: str) -> list[Point]:
        """The last points; none of them, if they are too few or without these figures."""
        found = self.points[-count:]
        return found if len(found) == count and all(n in p for p in found for n in names) else []

    def moved(self, points: list[Point], name: str) -> float:
        """A reward, or a difference of them, against where it began."""
        began = 0.0 if self.refers else self.first.get(name, 0.0)
        return _mean(points, name) - began


class PreferenceWatch:
    """Reads the rows of a preference run as they are logged.

    Args:
        method: the config's `rl`. kind: its `dpo_loss_type`. beta: its `rl_beta`.
        answers_per_step: pairs of a step, or for `kto` answers, over all processes.
        held_out_answers: those of an evaluation. warmup_steps: of the schedule. total_steps: of the run.
        state: what an earlier watch of the run knew, or {}; is changed in place, and holds JSON values only.
    """

    def __init__(
        self,
        method: str,
        *,
        beta: float,
        answers_per_step: int,
        held_out_answers: int,
        warmup_steps: int,
        total_steps: int,
        state: dict[str, Any],
        kind: str = "sigmoid",
    ) -> None:
        self.method = method
        self.kind = kind
        self.beta = beta
        self.answers_per_step = answers_per_step
        self.held_out_answers = held_out_answers
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.state = state

    def notice(self, row: Row) -> list[str]:
        """What there is to say after a training row or an evaluation row (`eval_` in front of its figures)."""
        held_out = any(name.startswith("eval_rewards/") for name in row)
        prefix = "eval_" if held_out else ""
        figures = {n: float(row[prefix + n]) for n in _READ if isinstance(row.get(prefix + n), (int, float))}
        figures = {name: value for name, value in figures.items() if isfinite(value)}
        series = self.state.setdefault("held_out" if held_out else "training", {"points": [], "best": {}})
        if CHOSEN not in figures and REJECTED not in figures:
            return []
        point: Point | None = {"step": row["step"], **figures}
        if not held_out:
            point = self._gather(series, int(row["step"]), figures)
        if point is None:
            return []
        self._take(series, point, _SEVERAL_HELD_OUT if held_out else _SEVERAL)
        view = self._view(series, held_out)
        said: list[str] = self.state.setdefault("said", [])
        found = {name: rule(view) for name, rule in RULES.items() if name not in said} if view.points else {}
        said += [name for name, sentence in found.items() if sentence]
        return [f"{view.where}: {sentence}" for sentence in found.values() if sentence]

    def _gather(self, series: dict[str, Any], step: int, figures: Point) -> Point | None:
        """Add a training row, the mean since the one before, to the point being made; the point, once it is whole."""
        began = series.setdefault("began", 0)
        sums = series.setdefault("sums", {})
        weight = step - series.get("step", 0)
        series["step"] = step
        for name, value in figures.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = [total + weight * value, count + weight]
        if step - began < STEPS or (step - began) * self.answers_per_step < ANSWERS:
            return None
        series["began"], series["sums"] = step, {}
        return {"step": step, **{name: total / count for name, (total, count) in sums.items()}}

    def _take(self, series: dict[str, Any], point: Point, several: int) -> None:
        series.setdefault("first", point)
        if point["step"] <= self.warmup_steps:
            return
        points, best = series["points"], series["best"]
        points.append(point)
        del points[:-_KEPT]
        for name in (MARGIN, ACCURACY):
            found = points[-several:]
            if len(found) == several and all(name in p for p in found):
                best[name] = max(best.get(name, float("-inf")), _mean(found, name))

    def _view(self, series: dict[str, Any], held_out: bool) -> _View:
        best = series["best"]
        nothing = float("-inf")
        return _View(
            self.method,
            self.kind,
            self.beta,
            held_out,
            self.held_out_answers if held_out else ANSWERS,
            self.total_steps,
            series["first"],
            series["points"],
            best.get(MARGIN, nothing),
            best.get(ACCURACY, nothing),
        )


def _stuck(v: _View) -> str | None:
    """Nothing has been learned where learning shows from the first step on."""
    points = v.last(v.several + 1, MARGIN, LOSS)
    if not v.refers or not points or any(abs(p[MARGIN]) >= _NOTHING for p in points):
        return None
    # The margin of a model that learns grows about evenly, until the learning rate falls.
    if points[-1][MARGIN] * v.total_steps / points[-1]["step"] >= _WORTH:
        return None
    loss = _mean(points, LOSS)
    logistic = v.method == "dpo" and v.kind in ("sigmoid", "robust", "sigmoid_norm")
    coin = " (log 2: a coin's)" if logistic and abs(loss - log(2)) < _NOTHING else ""
    return (
        f"the rewards of chosen and rejected still differ by {_mean(points, MARGIN):.4f}, and the loss is {loss:.4f}"
        f"{coin}: hardly anything has been learned in {points[-1]['step']:.0f} steps. {_why_stuck(points)}"
    )


def _why_stuck(points: list[Point]) -> str:
    last = points[-1]
    if min(abs(last.get(name, 0.0)) for name in (CHOSEN, REJECTED)) > max(_NOTHING, 3 * abs(last[MARGIN])):
        return (
            "Both rewards have moved, and by the same: the model cannot tell the sides apart. See in `luthier preview` "
            "whether chosen and rejected are nearly the same, or labelled by chance."
        )
    if all(p.get(NORM, 1.0) == 0 for p in points):
        return (
            "The gradient is zero: see that what is trained (lora_target_modules, unfrozen_parameters) is part of the "
            "model's forward pass, and in `luthier preview` that chosen and rejected are not the same."
        )
    rate = f" ({last[RATE]:.1e})" if RATE in last else ""
    if all(p.get(ACCURACY, 0.0) > _COIN + 0.1 for p in points):
        return f"The direction is right, the steps are too small: raise learning_rate{rate}."
    return (
        f"Raise learning_rate{rate}; see that the adapter is on layers that matter (lora_target_modules), and in "
        "`luthier preview` that chosen and rejected differ in what you mean."
    )


def _reversed(v: _View) -> str | None:
    """Rejected answers are preferred, and will be at the end."""
    points = v.last(v.several + 1, MARGIN, ACCURACY)
    if not points or any(p[ACCURACY] >= _COIN or p[MARGIN] > -_NOTHING * v.unit for p in points):
        return None
    if (accuracy := _mean(points, ACCURACY)) > _COIN - v.noise:
        return None
    step = _mean(points, "step")
    if _mean(points, MARGIN) + v.moved(points, MARGIN) * (v.total_steps - step) / step > 0:
        return None  # it began far below, and rises
    what = "answers are valued" if v.method == "kto" else "pairs are ranked"
    figures = f"only {accuracy:.0%} of the {what} as labelled, margin {_mean(points, MARGIN):.3f}"
    if v.held_out:
        return (
            f"{figures}. Either these rows are labelled the other way round from those trained on, or what is learned "
            "there does not hold here: compare both in `luthier preview`, and with the accuracy in training."
        )
    # Rewards that far from where they began are the work of steps that are too large.
    far = max(abs(v.moved(points, name)) for name in (CHOSEN, REJECTED) if name in points[0]) > v.unit
    cure = "lower learning_rate, rewards are far from where they began" if far else "raise learning_rate or rl_beta"
    return (
        f"{figures}, and at this pace the model will not come to prefer what is labelled chosen. See in `luthier "
        f"preview` whether chosen and rejected are swapped; if they are not, {cure}."
    )


def _collapsed(v: _View) -> str | None:
    """A margin or an accuracy that had been there is gone."""
    points = v.last(v.several, MARGIN, ACCURACY, LOSS)
    if not points:
        return None
    began = 0.0 if v.refers else v.first.get(MARGIN, 0.0)
    best, now = v.best_margin - began, v.moved(points, MARGIN)
    accuracy = _mean(points, ACCURACY)
    if best >= _WORTH * v.unit and now < _LEFT * best:
        what = f"the margin, once {v.best_margin:.3f}, is back at {now + began:.3f}"
    elif accuracy <= _COIN and v.best_accuracy - accuracy >= 2 * v.noise:
        what = f"the accuracy, once {v.best_accuracy:.2f}, is back at {accuracy:.2f}"
    else:
        return None
    cure = "the step with the best evaluation is the one to keep (load_best_model_at_end)"
    if v.held_out:
        return f"rewards collapsed: {what}. The model has stopped generalising: train for less; {cure}."
    return (
        f"rewards collapsed: {what}, and the loss is {_mean(points, LOSS):.4f}. Lower learning_rate, lengthen "
        f"warmup_steps, or lower max_grad_norm; {cure}."
    )


def _ran_away(v: _View) -> str | None:
    """Both rewards fall without end."""
    points = v.last(v.several, CHOSEN, REJECTED)
    far = -(_RUNAWAY if v.refers else _RUNAWAY_PER_TOKEN * v.beta)
    if not points or max(v.moved(points, CHOSEN), v.moved(points, REJECTED)) > far:
        return None
    if not all(_falls(points, name) for name in (CHOSEN, REJECTED)):
        return None
    chosen, rejected = points[-1][CHOSEN], points[-1][REJECTED]
    per = "an answer" if v.refers else "a token"
    return (
        f"both rewards run away downwards: chosen {chosen:.1f}, rejected {rejected:.1f}, which is "
        f"{-v.moved(points[-1:], CHOSEN) / v.beta:.0f} nats off each chosen log-prob of {per}. The model unlearns all "
        f"these texts alike, and what it writes instead nobody has chosen. {_cures(v)}"
    )


def _chosen_falls(v: _View) -> str | None:
    """The margin grows because rejected answers lose more than chosen ones do."""
    points = v.last(v.several, CHOSEN, MARGIN)
    if not points or v.kind == "apo_down":  # which is meant to do it
        return None
    fallen, margin = -v.moved(points, CHOSEN), v.moved(points, MARGIN)
    least = _FALL if v.refers else _FALL_PER_TOKEN * v.beta
    grows = margin >= _WORTH * v.unit and points[-1][MARGIN] > points[0][MARGIN]
    if fallen < max(least, _SHARE_OF_MARGIN * margin) or not grows or not _falls(points, CHOSEN):
        return None
    nats = fallen / v.beta
    times = f"{exp(nats):,.0f} times" if nats < 10 else f"e^{nats:.0f} times"
    per = f"{nats:.1f} nats each ({times} less likely)" if v.refers else f"{nats:.2f} nats a token"
    return (
        f"chosen answers lose probability while the margin grows: since training began they are down by {per}, at a "
        f"margin of {points[-1][MARGIN]:.2f}, which comes from the rejected ones losing more. {_cures(v)}"
    )


def _cures(v: _View) -> str:
    return {
        "dpo": "Cures: rpo_alpha (1.0, say; more, if it is set), a lower learning_rate, a higher rl_beta.",
        "ipo": "Cures: rpo_alpha (1.0, say; more, if it is set), a lower learning_rate, a higher rl_beta.",
        "kto": "Cures: a lower learning_rate, a higher rl_beta, a higher kto_desirable_weight.",
        "orpo": "Cures: a lower learning_rate, a lower rl_beta, which gives the likelihood of chosen answers more "
        "weight.",
        "simpo": "Cures: cpo_alpha (0.5, say; more, if it is set), a lower learning_rate, a lower simpo_gamma.",
    }[v.method]


def _kl_at_zero(v: _View) -> str | None:
    """KTO's point of comparison is missing: its estimate is cut off at zero, step after step."""
    points = v.last(v.several + 1, KL)
    if v.method != "kto" or not points or any(p[KL] > 0 for p in points):
        return None
    rewards = [_mean(points, name) for name in (CHOSEN, REJECTED) if all(name in p for p in points)]
    if not rewards or max(map(abs, rewards)) < 10 * _NOTHING:
        return None  # nothing has moved yet
    if all(p.get(CHOSEN, 0.0) > 0 for p in points):
        return None  # what matters is not cut off: desirable answers gain where others do not
    told = ", ".join(f"{r:.2f}" for r in rewards)
    return (
        f"the KL estimate is cut off at 0 in every step, while rewards fall ({told}): the model makes answers less "
        "likely, desirable ones and those to other prompts as well, and the loss has nothing to compare them with. "
        "Cures: a higher kto_desirable_weight (or a lower kto_undesirable_weight), larger steps, a lower learning_rate."
    )


def _kl_explodes(v: _View) -> str | None:
    """KTO's point of comparison runs away upwards."""
    points = v.last(v.several, KL)
    if v.method != "kto" or not points or any(v.beta * p[KL] < _FAR for p in points):
        return None
    if points[-1][KL] <= points[0][KL]:
        return None
    return (
        f"the KL estimate is {points[-1][KL]:.1f} nats and rises, {v.beta * points[-1][KL]:.1f} in units of reward: "
        "the model makes answers likelier whatever their prompt, and leaves its reference behind. Cures: a lower "
        "learning_rate, a higher rl_beta, a higher kto_undesirable_weight."
    )


RULES: dict[str, Callable[[_View], str | None]] = {
    "stuck": _stuck,
    "reversed": _reversed,
    "collapsed": _collapsed,
    "ran_away": _ran_away,
    "chosen_falls": _chosen_falls,
    "kl_at_zero": _kl_at_zero,
    "kl_explodes": _kl_explodes,
}


def _mean(points: list[Point], name: str) -> float:
    return sum(p[name] for p in points) / len(points)


def _falls(points: list[Point], name: str) -> bool:
    """It is lower at every point than at the one before."""
    return all(later[name] < earlier[name] for earlier, later in pairwise(points))
