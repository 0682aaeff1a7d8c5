"""Who is compared: name -> environment, script and variant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        environment: of `environments.py`. module: of `bench/peers/`. variant: given to it with the job.
        checkpoint: the module that makes the model folder in this one's own format, once, outside of all timing.
        families: the models that it knows, of those that `shapes.py` has.
    """

    name: str
    environment: str
    module: str
    variant: str = "default"
    checkpoint: str | None = None
    families: tuple[str, ...] = ("llama", "qwen3")


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("luthier", "luthier", "luthier"),
        Contender("trl", "trl", "trl"),
        Contender("trl-tuned", "trl", "trl", "tuned"),
        Contender("unsloth", "unsloth", "unsloth"),
        Contender("axolotl", "axolotl", "axolotl"),
        Contender("llamafactory", "llamafactory", "llamafactory"),
        Contender("litgpt", "litgpt", "litgpt", checkpoint="litgpt_checkpoint"),
        Contender("torchtune", "torchtune", "torchtune", families=("llama",)),
    )
}
