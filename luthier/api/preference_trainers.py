"""`ORPOTrainer`, `DPOTrainer`, `KTOTrainer` and `CPOTrainer`: TRL's names and arguments for tuning by preferences."""

from __future__ import annotations

from typing import Any

from luthier.api.arguments import CPOConfig, DPOConfig, KTOConfig, ORPOConfig
from luthier.api.rows import GivenRows, labelled_rows
from luthier.api.trainers import Trainer
from luthier.errors import ConfigError


class ORPOTrainer(Trainer):
    """Odds-ratio preference optimisation (Hong et al. 2024) with TRL's arguments."""

    arguments = ORPOConfig
    rl = "orpo"


class DPOTrainer(Trainer):
    """Direct preference optimisation (Rafailov et al. 2023) with TRL's arguments; the reference is the model with its
    adapter off, or as it begins."""

    arguments = DPOConfig
    rl = "dpo"

    def __init__(
        self, model: Any, ref_model: Any = None, args: Any = None, *, beta: float | None = None, **others: Any
    ) -> None:
        _check_reference("DPOTrainer", ref_model)
        self._beta = beta
        super().__init__(model, args, **others)

    def _own_keys(self) -> dict[str, Any]:
        asked = getattr(self.args, "loss_type", "sigmoid") or "sigmoid"
        losses = [asked] if isinstance(asked, str) else list(asked)
        if len(losses) != 1:
            raise ConfigError(f"DPOConfig: loss_type={losses}: one loss at a time")
        return {"rl": "dpo", "dpo_loss_type": losses[0], **({} if self._beta is None else {"rl_beta": self._beta})}


class KTOTrainer(Trainer):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024) with TRL's arguments, of answers with a label; the
    reference is that of `DPOTrainer`."""

    arguments = KTOConfig
    rl = "kto"

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **others: Any) -> None:
        _check_reference("KTOTrainer", ref_model)
        loss = getattr(args, "loss_type", "kto")
        if loss != "kto":
            raise ConfigError(f'KTOConfig: loss_type="{loss}" is not built here; write loss_type="kto"')
        super().__init__(model, args, **others)

    def _rows_of(self, dataset: Any, name: str) -> GivenRows:
        return labelled_rows(dataset, name)


class CPOTrainer(Trainer):
    """SimPO (Meng et al. 2024), which TRL has as a loss of CPO's, with TRL's arguments."""

    arguments = CPOConfig
    rl = "simpo"

    def __init__(self, model: Any, args: Any = None, **others: Any) -> None:
        loss = getattr(args, "loss_type", "sigmoid")
        if loss != "simpo":
            raise ConfigError(
                f'CPOConfig: loss_type="{loss}" is not built here: write loss_type="simpo", or use ORPOTrainer or '
                "DPOTrainer"
            )
        super().__init__(model, args, **others)


def _check_reference(name: str, ref_model: Any) -> None:
    if ref_model is not None:
        raise ConfigError(
            f"{name}: ref_model: the reference is the model as it begins, without a second copy of it: write "
            "ref_model=None"
        )
