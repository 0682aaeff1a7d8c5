"""Line charts, dots and histograms as inline SVG, drawn for reading at any width.

The drawing is stretched to the room that there is, with strokes that keep their width; words and numbers are HTML
beside it, so that they stay as large as the rest of the page. A curve of many points is thinned to bins of steps:
the line is the mean of a bin, and a band shows its lowest and highest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from luthier.experiments.run_files import Points

# Points of a curve that are drawn; an eye sees no more of them on a screen.
MOST_POINTS = 300
# Curves of one drawing that have so many points each; more curves share them.
FEW = 4
# Drawing units in both directions.
_SIZE = 1000
# From this ratio of largest to smallest on, the axis is logarithmic.
_WIDE = 25
# Words beside a point, as shares of the frame where it is narrow: a letter, the distance to the point, the most that
# the style sheet gives them, the height of a line.
_LETTER, _MARGIN, _WIDEST, _LINE = 0.019, 0.02, 0.48, 0.09


def number(value: float) -> str:
    """A number for an axis or a table: short, and exact enough to be told from its neighbours."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1e}" if size < 1e-3 else f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


@dataclass(frozen=True)
class Series:
    """One curve. `colour`: a class of the style sheet. `dots`: mark each point, which is then named when hovered.

    `line`: join the points. `names`: what a point is called when hovered, in place of where it is. `spans`: (x, lowest,
    highest) of what is drawn as bars through a point.
    """

    name: str
    points: Points
    colour: str
    dots: bool = False
    line: bool = True
    names: Sequence[str] = ()
    spans: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step, with words."""

    step: float
    text: str


@dataclass
class Chart:
    """What a chart shows. `form`: numbers of the axis. `about`: for who cannot see it; made up if empty.

    `x`: what goes from left to right. `x_log`: its scale, as `log`. `x_ticks`: the numbers beneath it; round ones if
    empty. `legend`: (colour, name) in place of the series' own. `labels`: (x, y, words beside that point), the most
    important first; those without room are left out.
    """

    title: str
    series: Sequence[Series]
    form: Callable[[float], str] = number
    marks: Sequence[Mark] = ()
    log: bool | None = False
    from_zero: bool = False
    about: str = ""
    note: str = ""
    x: str = "step"
    x_log: bool | None = False
    x_ticks: Sequence[float] = ()
    legend: Sequence[tuple[str, str]] = ()
    labels: Sequence[tuple[float, float, str]] = ()


def thinned(points: Points, most: int = MOST_POINTS) -> tuple[Points, list[tuple[float, float, float]]]:
    """The points themselves and no band, or, if there are too many, means of bins with (step, lowest, highest).

    A bin stands at the middle of its steps, but the first and last points keep their steps.
    """
    if len(points) <= most:
        return points, []
    line: Points = []
    band = []
    for place in range(most):
        part = points[place * len(points) // most : (place + 1) * len(points) // most]
        values = [value for _, value in part]
        step = sum(step for step, _ in part) / len(part)
        step = part[0][0] if place == 0 else part[-1][0] if place == most - 1 else step
        line.append((step, sum(values) / len(values)))
        band.append((step, min(values), max(values)))
    return line, band


def line_chart(chart: Chart) -> Markup:
    """A figure with a legend, or nothing if there is nothing to draw."""
    series = [each for each in chart.series if each.points]
    joined = [each for each in series if each.line]
    if not any(len(each.points) > 1 for each in series) and (joined or len(series) < 2):
        return Markup("")
    few = len(series) <= FEW
    most = MOST_POINTS if few else max(40, FEW * MOST_POINTS // len(series))
    drawn = []
    for each in series:
        line, band = thinned(each.points, most)
        drawn.append((each, line, band if few else []))  # many bands hide each other
    values = [value for _, line, band in drawn for value in [y for _, y in line] + [y for b in band for y in b[1:]]]
    values += [value for each in series for _, *ends in each.spans for value in ends]
    y_axis = Axis.over(values, log=chart.log, from_zero=chart.from_zero)
    x_axis = Axis.along([x for each in series for x, _ in each.points], chart)
    inside: list[Markup] = []
    for tick in y_axis.ticks:
        y = _unit(1 - y_axis.at(tick))
        inside.append(Markup('<path class="grid" d="M0 {0}H{1}"/>').format(y, _SIZE))
    for mark in chart.marks:
        inside.append(Markup('<path class="mark" d="M{0} 0V{1}"/>').format(_unit(x_axis.at(mark.step)), _SIZE))
    for each, line, band in drawn:
        inside += _curve(each, line, band, x_axis, y_axis, chart.x)
    about = chart.about or _about(chart, series)
    log = Markup("<span class=scale>(log scale)</span>") if y_axis.log else ""
    return Markup(
        '<figure class="chart{kind}"><figcaption><b>{title}</b>{log} {legend}</figcaption><div class="frame">'
        '<svg viewBox="0 0 {size} {size}" preserveAspectRatio="none" role="img" aria-label="{about}">{inside}</svg>'
        "{labels}</div>{note}</figure>"
    ).format(
        kind="" if chart.x == "step" else " xy",
        title=chart.title,
        log=log,
        legend=_legend(chart, series),
        size=_SIZE,
        about=about,
        inside=Markup("").join(inside),
        labels=_labels(chart, x_axis, y_axis),
        note=Markup("<p class=small>{}</p>").format(chart.note) if chart.note else "",
    )


def histogram(bins: Sequence[tuple[float, float, float]], title: str, unit: str) -> Markup:
    """Bars for (lowest, highest, count), each named when hovered."""
    bins = [each for each in bins if len(each) == 3]
    most = max((count for *_, count in bins), default=0)
    if len(bins) < 2 or not most:
        return Markup("")
    axis = Axis(0.0, most, ticks=[tick for tick in _ticks(0, most, 3) if tick <= most])
    width = _SIZE / len(bins)
    inside = [
        Markup('<path class="grid" d="M0 {0}H{1}"/>').format(_unit(1 - axis.at(tick)), _SIZE) for tick in axis.ticks
    ]
    for place, (low, high, count) in enumerate(bins):
        inside.append(
            Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                f"{(place + 0.06) * width:.1f}",
                _unit(1 - axis.at(count)),
                f"{0.88 * width:.1f}",
                _unit(axis.at(count)),
                f"{low:,.0f} to {high:,.0f} tokens: {count:,.0f} {unit}",
            )
        )
    rows = [
        Markup('<span class="y" style="top:{}%" aria-hidden="true">{}</span>').format(
            f"{100 * (1 - axis.at(tick)):.2f}", number(tick)
        )
        for tick in axis.ticks
    ]
    every = -(-len(bins) // 6)
    rows += [
        Markup('<span class="x" style="left:{}%" aria-hidden="true">{}</span>').format(
            f"{100 * (place + 0.5) / len(bins):.2f}", number(bins[place][0])
        )
        for place in range(0, len(bins), every)
    ]
    at_most = max(bins, key=lambda each: each[2])
    about = (
        f"{title}: from {bins[0][0]:,.0f} to {bins[-1][1]:,.0f} tokens; most of the {unit}, {at_most[2]:,.0f}, have "
        f"{at_most[0]:,.0f} to {at_most[1]:,.0f}"
    )
    return Markup(
        '<figure class="chart"><figcaption><b>{}</b> {} of so many tokens</figcaption><div class="frame">'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>{}</div></figure>'
    ).format(title, unit, _SIZE, _SIZE, about, Markup("").join(inside), Markup("").join(rows))


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], *, log: bool | None, from_zero: bool) -> Axis:
        """An axis that holds all values. `log`: None to let their ratio decide."""
        low, high = min(values), max(values)
        if log is None:
            log = low > 0 and high / low >= _WIDE
        if log:
            ticks = _log_ticks(low, high)
            low, high = min(low, *ticks), max(high, *ticks)
            return cls(low, high, ticks, True)
        if from_zero or 0 < low < 0.4 * high:
            low = min(low, 0.0)
        if high - low <= 1e-6 * max(abs(low), abs(high)):  # the same, but for rounding
            low, high = low - abs(low or 1) * 0.1, high + abs(high or 1) * 0.1
        step = _step(low, high, 4)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(first * step, last * step, [place * step for place in range(first, last + 1)])

    @classmethod
    def along(cls, values: Sequence[float], chart: Chart) -> Axis:
        """The axis from left to right: it begins and ends with what is there."""
        first, last = min(values), max(values)
        last = last if last > first else first + 1
        log = first > 0 and last / first >= _WIDE if chart.x_log is None else chart.x_log
        if log:
            tens = _log_ticks(first, last)
            ticks = [tick for tick in tens if first <= tick <= last]
            if len(ticks) < 3:
                ticks = [tick * factor for tick in tens for factor in (1, 2, 5) if first <= tick * factor <= last]
            return cls(first, last, chart.x_ticks or ticks, True)
        if chart.x_ticks or chart.x == "step":
            return cls(first, last, chart.x_ticks or _ticks(first, last, 5))
        return cls.over([first, last], log=False, from_zero=False)

    def at(self, value: float) -> float:
        """From 0 to 1 along the axis."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _step(low: float, high: float, count: int) -> float:
    """A round number that goes about so many times into a range."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    return next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round whole numbers within a range, about so many."""
    if high <= low:
        return [low]
    step = max(1.0, math.ceil(_step(low, high, count)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from below to above a range; every few, where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, -(-(last - first) // 5))
    return [10.0**power for power in range(first, last + every, every)]


def _curve(
    series: Series,
    line: Points,
    band: list[tuple[float, float, float]],
    x_axis: Axis,
    y_axis: Axis,
    x_name: str,
) -> list[Markup]:
    def place(step: float, value: float) -> str:
        return f"{_unit(x_axis.at(step))} {_unit(1 - y_axis.at(value))}"

    found = []
    if band:
        there = [place(step, high) for step, _, high in band]
        back = [place(step, low) for step, low, _ in reversed(band)]
        found.append(
            Markup('<path class="band {}" d="M{}Z"/>').format(series.colour, "L".join([*there, *back]))
        )
    for x, low, high in series.spans:
        ends = f"{place(x, low)}L{place(x, high)}"
        found.append(Markup('<path class="line {}" d="M{}"/>').format(series.colour, ends))
    if series.line:
        path = "L".join(place(step, value) for step, value in line)
        found.append(Markup('<path class="line {}" d="M{}"/>').format(series.colour, path))
    if series.dots and (len(line) <= 60 or not series.line):
        form = ",.0f" if x_name == "step" else ".6g"
        names = series.names or [f"{series.name}, {x_name} {step:{form}}: {value:.5g}" for step, value in line]
        found += [
            # A stroke without length and with round ends is a dot, however the drawing is stretched.
            Markup('<path class="dot {}" d="M{}h0"><title>{}</title></path>').format(
                series.colour, place(step, value), name
            )
            for (step, value), name in zip(line, names, strict=False)
        ]
    return found


def _labels(chart: Chart, x_axis: Axis, y_axis: Axis) -> Markup:
    spans = [
        Markup('<span class="y" style="top:{}%" aria-hidden="true">{}</span>').format(
            f"{100 * (1 - y_axis.at(tick)):.2f}", chart.form(tick)
        )
        for tick in y_axis.ticks
    ]
    spans += [
        Markup('<span class="x" style="left:{}%" aria-hidden="true">{}</span>').format(
            f"{100 * x_axis.at(tick):.2f}", number(tick)
        )
        for tick in x_axis.ticks
    ]
    spans.append(Markup('<span class="under" aria-hidden="true">{}</span>').format(chart.x))
    taken: list[tuple[float, float, float]] = []
    for x, y, text in chart.labels:
        share, up = x_axis.at(x), y_axis.at(y)
        wide = min(_WIDEST, _LETTER * len(text) + _MARGIN)
        left, right = (share - wide, share) if share > 0.5 else (share, share + wide)
        if any(abs(up - other) < _LINE and left < end and begin < right for begin, end, other in taken):
            continue
        taken.append((left, right, up))
        side = f"right:{100 * (1 - share):.2f}%" if share > 0.5 else f"left:{100 * share:.2f}%"
        spans.append(
            Markup('<span class="label" style="{};top:{}%" aria-hidden="true">{}</span>').format(
                side, f"{100 * (1 - up):.2f}", text
            )
        )
    return Markup("").join(spans)


def _legend(chart: Chart, series: Sequence[Series]) -> Markup:
    if len(chart.series) < 2 and not chart.marks and not chart.legend:
        return Markup("")
    names = chart.legend or [(each.colour, each.name) for each in series if each.name]
    keys = [Markup('<span class="key {}">{}</span>').format(colour, name) for colour, name in names]
    keys += [Markup('<span class="key mark">{}</span>').format(mark.text) for mark in chart.marks]
    return Markup(" ").join(keys)


def _about(chart: Chart, series: Sequence[Series]) -> str:
    parts = [
        f"{each.name} from {each.points[0][1]:.4g} at {chart.x} {each.points[0][0]:,.0f} to {each.points[-1][1]:.4g} "
        f"at {chart.x} {each.points[-1][0]:,.0f}, between {min(y for _, y in each.points):.4g} and "
        f"{max(y for _, y in each.points):.4g}"
        for each in series
    ]
    return f"{chart.title}. {'; '.join(parts)}. {' '.join(mark.text for mark in chart.marks)}".strip()


def _unit(share: float) -> str:
    return f"{_SIZE * share:.1f}".removesuffix(".0")
