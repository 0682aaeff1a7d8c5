"""Who is compared: name -> environment, script and variant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        environment: of `environments.py`. module: of `bench/peers/`. variant: given to it with the job.
    """

    name: str
    environment: str
    module: str
    variant: str = "default"


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("luthier", "luthier", "luthier"),
        Contender("trl", "trl", "trl"),
        Contender("trl-tuned", "trl", "trl", "tuned"),
    )
}
