"""What a run took from Weights & Biases, and what it gives back: its inputs by name, its result as an artifact.

The result is what `luthier push` would upload, with paths of this machine and secrets replaced: weights, tokenizer,
card, settings and report; never data, logs or optimizer state. An upload that fails costs the upload only: the run's
folder is whole without it, and how to send it again is said.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import luthier
from luthier.artifacts.sink import clean_name, how_to_send, is_offline, record
from luthier.config import Config
from luthier.export.parcel import pack
from luthier.train.artifacts import figures
from luthier.train.trackers import Trackers

log = logging.getLogger("luthier")


class Uploads:
    """The artifacts of one run.

    Args:
        folder: the run's. inputs: what it takes, as `artifacts.source.described` says it.
    """

    def __init__(self, config: Config, folder: Path, trackers: Trackers, inputs: Sequence[Mapping[str, str]]) -> None:
        self._config, self._folder, self._trackers = config, folder, trackers
        self._when = config.logging.wandb_log_model
        self._name = clean_name(config.logging.wandb_name or folder.resolve().name)
        run = trackers.wandb_run
        if run is None or not inputs:
            return
        if is_offline(run):
            log.info("Weights & Biases is offline: the run's page will not say which artifacts it was made from")
            return
        for name in dict.fromkeys(each["artifact"] for each in inputs):
            try:
                run.use_artifact(_without_inside(name))
            except Exception as error:  # the page says less; the run is what it is
                log.warning("%s could not be named as an input on the run's page: %s", name, _first_line(error))

    def checkpoint(self, path: Path) -> None:
        """A checkpoint that was written; uploaded if `wandb_log_model: checkpoint` asks for it."""
        if self._when == "checkpoint":
            step = path.name.removeprefix("checkpoint-")
            self._send(path, ["checkpoint", f"step-{step}"], {"step": int(step) if step.isdigit() else step})

    def result(self, summary: Mapping[str, Any]) -> None:
        """The result at the top of the run folder."""
        if self._when in ("end", "checkpoint"):
            self._send(self._folder, ["final", f"step-{summary.get('kept_step')}"], figures(summary), last=True)

    def _send(self, source: Path, aliases: Sequence[str], values: Mapping[str, Any], last: bool = False) -> None:
        run = self._trackers.wandb_run
        again = f"luthier push {source} wandb:entity/project/{self._name} uploads it"
        if run is None:
            log.warning("wandb_log_model: Weights & Biases failed before, so %s was not uploaded; %s", source, again)
            return
        try:
            report = last and (self._folder / "report.html").is_file()
            parcel = pack(str(source), f"wandb/{self._name}", report=report, artifact=True)
            for remark in parcel.remarks:
                log.info("%s", remark)
            metadata = {"luthier": luthier.__version__, "base_model": parcel.base, **values}
            name = record(run, self._name, "model", parcel.files, aliases=aliases, metadata=metadata, wait=last)
        except Exception as error:
            # Whatever it is (a network that went away, a full disk, a quota): the result is in the folder.
            log.warning(
                "wandb_log_model: %s was not uploaded: %s: %s. Nothing is lost: it stays in its folder; %s",
                source, type(error).__name__, _first_line(error), again,
            )  # fmt: skip
            return
        if is_offline(run):
            log.info("%s is the artifact %s of an offline run: %s", source, name, how_to_send(run))
        else:
            log.info("%s is %s wandb:%s", source, "the artifact" if last else "on its way to the artifact", name)


def _without_inside(name: str) -> str:
    owner, _, behind = name.removeprefix("wandb:").partition(":")
    return f"{owner}:{behind.partition('/')[0]}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
