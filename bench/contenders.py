"""Who is compared: name -> environment, script and variant."""

from __future__ import annotations

from dataclasses import dataclass

from bench.rows import TASKS


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        environment: of `environments.py`. module: of `bench/peers/`. variant: given to it with the job.
        checkpoint: the module that makes the model folder in this one's own format, once, outside of all timing.
        families: the models that it knows, of those that `shapes.py` has.
        tasks: that it takes part in.
        by_name: runs only where `--only` names it: it saves memory by other means than the rest, or on other weights.
    """

    name: str
    environment: str
    module: str
    variant: str = "default"
    checkpoint: str | None = None
    families: tuple[str, ...] = ("llama", "qwen3")
    tasks: tuple[str, ...] = ("sft",)
    by_name: bool = False


_REFERENCE = ("dpo", "kto")

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("luthier", "luthier", "luthier", tasks=TASKS),
        Contender("luthier-lean", "luthier", "luthier", "lean", tasks=TASKS, by_name=True),
        Contender("luthier-precomputed", "luthier", "luthier", "precomputed", tasks=_REFERENCE, by_name=True),
        Contender("luthier-qlora", "luthier", "luthier", "qlora", by_name=True),
        Contender("trl", "trl", "trl", tasks=TASKS),
        Contender("trl-tuned", "trl", "trl", "tuned", tasks=TASKS),
        Contender("trl-precomputed", "trl", "trl", "precomputed", tasks=_REFERENCE, by_name=True),
        Contender("trl-qlora", "trl", "trl", "qlora", by_name=True),
        Contender("unsloth", "unsloth", "unsloth"),
        Contender("axolotl", "axolotl", "axolotl"),
        Contender("llamafactory", "llamafactory", "llamafactory"),
        Contender("litgpt", "litgpt", "litgpt", checkpoint="litgpt_checkpoint"),
        Contender("torchtune", "torchtune", "torchtune", families=("llama",)),
    )
}
