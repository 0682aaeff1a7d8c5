"""A comparison of strategies as people and as programs read it."""

from __future__ import annotations

from typing import Any

import yaml

from luthier.plan.strategies import Row, Scaling
from luthier.plan.table import gib, table


def scaling_text(scaling: Scaling) -> list[str]:
    """The table of strategies, and the one to take."""
    known = all(row.share is not None for row in scaling.rows)
    fits = any(row.fits is not None for row in scaling.rows)
    head = ["", "", "memory a GPU"] + ["fits"] * fits + ["passes a step", "sent a step", "communication a step"]
    rows = [head + (["of the time", "tokens/s"] if known else [])]
    rows += [_cells(row, fits=fits) for row in scaling.rows if not row.refused]
    lines = [
        f"{scaling.gpus} GPUs, {scaling.links.said}",
        "each has a pass of its own; communication is what computation does not hide, and of all GPUs is tokens/s"
        if known
        else "each has a pass of its own; how fast they compute is not known, so nothing counts as hidden",
        *table(rows, numbers=range(2, len(rows[0]))),
        "* as the config has it",
        *(f"{row.strategy.name}: not with this config: {row.refused}" for row in scaling.rows if row.refused),
    ]
    if scaling.best is None:
        return [*lines, f"no recommendation: {scaling.why}"]
    lines.append(f"recommended: {scaling.best.strategy.name}: {scaling.why}")
    if scaling.best.chosen:
        return [*lines, "the config has it already"]
    instead = ", ".join(key for key in scaling.chosen.strategy.keys if key not in scaling.best.strategy.keys)
    changed = f", in place of {instead}" if instead and instead != "ddp" else ""
    return [*lines, f"in the YAML{changed}:", *(f"  {line}" for line in yaml_of(scaling.best).splitlines())]


def _cells(row: Row, *, fits: bool) -> list[str]:
    cells = ["*" if row.chosen else "", row.strategy.name, gib(row.memory.total)]
    cells += [{True: "yes", False: "no", None: ""}[row.fits]] * fits
    cells += [f"{row.passes:,}", gib(row.sent), f"{1000 * row.exposed:,.1f} ms"]
    if row.share is None:
        return cells
    return [*cells, f"{row.share:.1%}", f"{row.tokens_per_second:,.0f}"]


def yaml_of(row: Row) -> str:
    """The lines of a config that choose a strategy."""
    return yaml.safe_dump(dict(row.strategy.keys), sort_keys=False)


def scaling_json(scaling: Scaling) -> dict[str, Any]:
    """All of it as plain data; bytes and seconds."""
    return {
        "num_gpus": scaling.gpus,
        "gpus_per_node": scaling.links.per_node,
        "interconnect": scaling.links.said,
        "strategies": [
            {
                "name": row.strategy.name,
                "keys": dict(row.strategy.keys),
                "chosen": row.chosen,
                "refused": row.refused or None,
                "memory": row.memory.as_json(),
                "fits": row.fits,
                "pass": row.one.tokens,
                "passes": row.passes,
                "recompute": row.recompute,
                "sent": round(row.sent),
                "communication": {"all": row.seconds, "exposed": row.exposed, "share": row.share},
                "compute": row.compute,
                "tokens_per_second": row.tokens_per_second,
            }
            for row in scaling.rows
        ],
        "recommended": None if scaling.best is None else scaling.best.strategy.name,
        "why": scaling.why,
        "yaml": None if scaling.best is None else yaml_of(scaling.best),
    }
