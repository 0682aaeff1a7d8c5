"""What is to be merged, found from a run, an adapter or a config."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.config import Config
from luthier.errors import ConfigError, ModelError
from luthier.export.adapters import Share, parse_share
from luthier.models import adapter_files
from luthier.models.assemble import RUN_CONFIG

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class Job:
    """Attributes:
    shares: the adapters. base_model, revision: what they are for. out: folder of the result.
    config: of the run, if one is known; it says how the base was loaded, and has sample rows.
    """

    shares: tuple[Share, ...]
    base_model: str
    revision: str | None
    config: Config | None
    out: Path

    @property
    def weights(self) -> list[float]:
        return [1.0 if share.weight is None else share.weight for share in self.shares]

    @property
    def folders(self) -> list[Path]:
        return [share.folder for share in self.shares]

    def loading(self, *, quantized: bool) -> Config:
        """The config by which the base is loaded: the run's, or one that says no more than its name."""
        if self.config is not None:
            found = self.config.replace("merging", base_model=self.base_model, revision=self.revision)
            return found if quantized else unquantized(found)
        values: dict[str, object] = {
            "base_model": self.base_model,
            "datasets": [{"path": "none", "type": "completion"}],
        }
        if self.revision:
            values["revision"] = self.revision
        return Config.from_flat(values)


def find_job(
    source: str, overrides: Sequence[str], further: Sequence[str], *, base_model: str | None, out: str | None
) -> Job:
    """Read the command line.

    Args:
        source: `DIR`, `DIR:WEIGHT` or a YAML file. overrides: for the YAML file's keys.
        further: more adapters, each `DIR:WEIGHT`.

    Raises:
        ConfigError: adapters or weights are missing, or do not go together.
        ModelError: no adapter there.
    """
    first, config = _first(source, overrides)
    shares = (first, *(parse_share(text) for text in further))
    for share in shares:
        _check_folder(share.folder)
    without = [str(share.folder) for share in shares if share.weight is None]
    if len(shares) > 1 and without:
        raise ConfigError(
            f"{len(shares)} adapters and {len(shares) - len(without)} weights: write one behind each, "
            f"{without[0]}:0.5"
        )
    found = [adapter_files.read_adapter_config(share.folder) for share in shares]
    named = {str(each.get("base_model_name_or_path") or "") for each in found}
    if base_model is None and config is not None and source_is_config(source):
        base_model = config.model.base_model
    if base_model is None:
        if len(named) > 1:
            raise ConfigError(
                f"the adapters are for different base models ({', '.join(sorted(named))}); if these are the same, "
                "name it with --base-model"
            )
        base_model = next(iter(named))
    if not base_model:
        raise ConfigError(f"{first.folder}: the adapter does not say which base it is for; name it with --base-model")
    if base_model not in named:
        log.warning("the adapter names %s as its base, and is merged into %s", min(named) or "nothing", base_model)
    revision = found[0].get("revision") if base_model in named else None
    if config is not None and config.model.base_model == base_model:
        revision = config.model.revision or revision
    if out is None and len(shares) > 1:
        raise ConfigError("several adapters need --out, the folder of the result")
    target = Path(out).expanduser() if out else first.folder / "merged"
    return Job(shares, base_model, revision, config, target)


def unquantized(config: Config) -> Config:
    """The config with a base that is loaded as its checkpoint is."""
    return config.replace("merging", load_in_4bit=None, load_in_8bit=None)


def source_is_config(source: str) -> bool:
    return Path(source).suffix in (".yml", ".yaml")


def _first(source: str, overrides: Sequence[str]) -> tuple[Share, Config | None]:
    if source_is_config(source):
        place, rest = _taken(overrides, "lora_model_dir")
        config = Config.load(source, rest)
        if place is None:
            # What the run made, which may itself have gone on from another adapter.
            own, before = Path(config.output.output_dir).expanduser(), config.adapter.lora_model_dir
            place = before if before and not (own / adapter_files.CONFIG).is_file() else str(own)
        return parse_share(place), config
    if overrides:
        raise ConfigError(
            f"{overrides[0]!r}: neither an option of merge-lora, nor a key to override, since {source} is no YAML "
            "file; luthier merge-lora --help lists the options"
        )
    share = parse_share(source)
    return share, config_of(share.folder)


def _taken(overrides: Sequence[str], key: str) -> tuple[str | None, list[str]]:
    """The value of one key among overrides, and the others. To training it would mean to begin from that adapter,
    which excludes settings that a run may have."""
    value, rest, remaining = None, [], list(overrides)
    while remaining:
        argument = remaining.pop(0)
        name, equals, given = argument.partition("=")
        if name.removeprefix("--").replace("-", "_") != key:
            rest.append(argument)
        elif equals:
            value = given
        elif name.startswith("--") and remaining:
            value = remaining.pop(0)
        else:
            raise ConfigError(f"{argument}: name the adapter's folder, --lora-model-dir=DIR")
    return value, rest


def config_of(folder: Path) -> Config | None:
    """Of the run that made an adapter, from the folder itself or from above a checkpoint."""
    above = [folder.resolve().parent] if folder.resolve().name.startswith("checkpoint-") else []
    for place in (folder, *above):
        if (place / RUN_CONFIG).is_file():
            return Config.load(place / RUN_CONFIG)
    return None


def _check_folder(folder: Path) -> None:
    if (folder / adapter_files.CONFIG).is_file():
        return
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder")
    if (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds a whole model and no adapter: there is nothing to merge")
    if (folder / RUN_CONFIG).is_file():
        raise ModelError(
            f"{folder}: the run has not ended yet, or was cut off: no adapter at its top; give one of its checkpoint-N "
            "folders, or go on with resume_from_checkpoint: auto"
        )
    raise ModelError(f"{folder}: no adapter here ({adapter_files.CONFIG} is missing)")
