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
        by_name: runs only where `--only` names it: it saves memory by other means than the rest, or on other weights.
    """

    name: str
    environment: str
    module: str
    variant: str = "default"
    checkpoint: str | None = None
    families: tuple[str, ...] = ("llama", "qwen3")
    by_name: bool = False


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("luthier", "luthier", "luthier"),
        Contender("luthier-lean", "luthier", "luthier", "lean", by_name=True),
        Contender("luthier-qlora", "luthier", "luthier", "qlora", by_name=True),
        Contender("trl", "trl", "trl"),
        Contender("trl-tuned", "trl", "trl", "tuned"),
        Contender("trl-qlora", "trl", "trl", "qlora", by_name=True),
        Contender("unsloth", "unsloth", "unsloth"),
        Contender("axolotl", "axolotl", "axolotl"),
        Contender("llamafactory", "llamafactory", "llamafactory"),
        Contender("litgpt", "litgpt", "litgpt", checkpoint="litgpt_checkpoint"),
        Contender("torchtune", "torchtune", "torchtune", families=("llama",)),
    )
}
