"""Rows of dots on one axis, each with its name before it: what is drawn of keys whose values are words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from luthier.experiments.charts import Axis

_SIZE = 1000


@dataclass(frozen=True)
class Strip:
    """A row. `dots`: (value, what it is called when hovered). `ends`: of a line through the middle."""

    name: str
    middle: float
    dots: Sequence[tuple[float, str]]
    ends: tuple[float, float] | None = None


def strips(
    title: str, rows: Sequence[Strip], form: Callable[[float], str], note: str = "", *, zero: bool = False
) -> Markup:
    """A figure, or nothing for fewer than two rows. `zero`: the axis holds it, and it is marked."""
    if len(rows) < 2:
        return Markup("")
    values = [number for row in rows for number in (*(dot for dot, _ in row.dots), row.middle, *(row.ends or ()))]
    axis = Axis.over([*values, 0.0] if zero else values, log=False if zero else None, from_zero=False)
    drawn = []
    for row in rows:
        inside = [Markup('<path class="grid" d="M0 50H{}"/>').format(_SIZE)]
        if zero:
            inside.append(Markup('<path class="mark" d="M{} 0V100"/>').format(_at(axis, 0.0)))
        if row.ends:
            low, high = (_at(axis, end) for end in row.ends)
            inside.append(Markup('<path class="line c1" d="M{} 50H{}"/>').format(low, high))
        else:
            inside.append(Markup('<path class="line c2" d="M{} 12V88"/>').format(_at(axis, row.middle)))
        inside += [
            Markup('<path class="dot c1" d="M{} 50h0"><title>{}</title></path>').format(_at(axis, dot), name)
            for dot, name in row.dots
        ]
        drawn.append(
            Markup(
                '<div class="strip"><span class="of">{}</span><svg viewBox="0 0 {} 100" preserveAspectRatio="none" '
                'role="img" aria-label="{}">{}</svg><span class="amount">{}</span></div>'
            ).format(row.name, _SIZE, f"{row.name}: {form(row.middle)}", Markup("").join(inside), form(row.middle))
        )
    ticks = Markup("").join(
        Markup('<span style="left:{}%">{}</span>').format(f"{100 * axis.at(tick):.2f}", form(tick))
        for tick in (axis.ticks[0], axis.ticks[-1])
    )
    return Markup(
        '<figure class="chart strips"><figcaption><b>{}</b>{}</figcaption>{}'
        '<div class="strip ends" aria-hidden="true"><span class="of"></span><div>{}</div><span class="amount"></span>'
        "</div>{}</figure>"
    ).format(
        title,
        Markup("<span class=scale>(log scale)</span>") if axis.log else "",
        Markup("").join(drawn),
        ticks,
        Markup("<p class=small>{}</p>").format(note) if note else "",
    )


def _at(axis: Axis, number: float) -> str:
    return f"{_SIZE * axis.at(number):.1f}"
