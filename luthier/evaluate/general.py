"""The general set: what a model could do before it was tuned for something else.

`general.jsonl` beside this file holds short rows of eleven kinds (facts, arithmetic, code, prose, languages, ...),
written for Luthier. A row is a text in two parts: the model reads `prompt` and is scored on each token of `answer`, as
plain text, with no template around it and no end predicted, so that the same tokens are scored before and after a run,
whatever format it trains. What is looked at is the change: it is a watch for forgetting, and no benchmark.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from luthier.config import Config, DatasetEntry
from luthier.data.cache import Writer
from luthier.data.dataset import TokenDataset
from luthier.data.encode import TextEncoder
from luthier.data.held_out import HeldOut
from luthier.data.report import SourceReport
from luthier.data.tokenise import DOCUMENT, IGNORED, Chunk
from luthier.errors import ConfigError
from luthier.evaluate.figures import all_figures
from luthier.evaluate.measure import DocumentScores
from luthier.evaluate.results import RUN_CONFIG, run_folder, write_results
from luthier.evaluate.sides import Side, of_rows, row_lines
from luthier.evaluate.what_data import Wanted, must_exist
from luthier.models.load import read_model_config
from luthier.models.rope import positions

log = logging.getLogger("luthier")

ROWS = Path(__file__).with_name("general.jsonl")
# Of the kind of result and of its file; the column whose values are the groups.
NAME, GROUP = "general", "category"


@cache
def rows() -> list[dict[str, str]]:
    """All rows, each with `category`, `prompt` and `answer`."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def general_set(tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> HeldOut:
    """The rows as a tokenizer cuts them, prompt and answer each for itself, behind its BOS if it has one.

    Args:
        limit: positions of the model; a longer row is left out, which is said.

    Raises:
        ConfigError: no row is left.
    """
    encoder = TextEncoder(tokenizer)
    prompts = encoder.beginnings([row["prompt"] for row in rows()])
    answers = encoder.continuations([row["answer"] for row in rows()])
    ids, labels, documents = [], [], []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        before = encoder.opening + prompt
        # The first token of a document cannot be predicted (a tokenizer that has no token for a prompt).
        own = [*([IGNORED] * len(before)), *answer]
        own[0] = IGNORED
        trained = sum(label != IGNORED for label in own)
        if not trained or (limit is not None and len(own) > limit):
            continue
        new = np.asarray(before + answer, np.int32)
        hashed = int.from_bytes(hashlib.blake2b(new.tobytes(), digest_size=8).digest(), "little")
        ids.append(new)
        labels.append(np.asarray(own, np.int32))
        documents.append((len(own), trained, number, 0, number + 1, 1, 0, 0, 1, hashed))
    if not documents:
        raise ConfigError(f"the general set: no row of it fits the model's {limit} positions")
    if (left := len(rows()) - len(documents)) > 0:
        log.warning("the general set: %d of its %d rows are longer than the model's %s positions, and are left out",
                    left, len(rows()), limit)  # fmt: skip
    records = np.asarray(documents, DOCUMENT)
    with Writer(None) as writer:
        columns = set(rows()[0])
        flat = (np.concatenate(ids), np.concatenate(labels))
        writer.add(Chunk(*flat, records, records["length"].copy(), [ROWS.name], len(rows()), columns))
        store = writer.finish({})
    content = hashlib.sha256(ROWS.read_bytes()).hexdigest()
    source = SourceReport(str(ROWS), "general", content, len(rows()), len(records))
    return HeldOut(TokenDataset(store), [DatasetEntry(path=str(ROWS), type="completion")], [source], NAME)


def general_data(target: str) -> Wanted:
    """The general set for a run, an adapter or a model.

    Raises:
        ConfigError: there is no such folder.
    """
    must_exist(target)
    folder = run_folder(target)
    run = None if folder is None else Config.load(folder / RUN_CONFIG)
    if run is not None:
        config = as_text(run)
    else:
        entry = {"path": str(ROWS), "type": "completion"}
        config = Config.from_flat({"base_model": target, "datasets": [entry]}, "--general")
        if (limit := limit_of(config)) is not None and limit < config.data.sequence_len:
            config = config.replace("the model's positions", sequence_len=limit)
    return Wanted(config, run, run is not None, NAME, "the general set", general=True)


def as_text(config: Config) -> Config:
    """A run's config for rows that are plain text, whatever its own are."""
    return config.replace("--general", rl=None)


def limit_of(config: Config) -> int | None:
    """Positions of the base model; None where they are not known here (an adapter's), or there is no limit."""
    folder = Path(config.model.base_model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        return None
    return positions(read_model_config(config.model).get_text_config(decoder=True))


def write_general(
    folder: Path,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    general: HeldOut,
    before: DocumentScores,
    after: DocumentScores,
    *,
    target: str,
    compare: str,
    settings: dict[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """What a run has measured itself, as `luthier evaluate --general` would write it.

    Args:
        folder: of the results. before, after: the model as the run began, and as it ended.
    """
    config, every = as_text(config), np.arange(len(general.documents))
    sides = [
        Side("tuned", target, config, tokenizer, config, general, every, scores=after),
        Side("base", compare, config, tokenizer, config, general, every, scores=before),
    ]
    numbers = general.documents.rows
    columns = {number: {GROUP: rows()[number][GROUP]} for number in numbers.tolist()}
    found = of_rows(sides, numbers)
    groups = {GROUP: [columns[number][GROUP] for number in numbers.tolist()]}
    seed = 0  # of the intervals, as in `evaluate_data`
    return write_results(
        folder,
        NAME,
        kind=NAME,
        target=target,
        compare=compare,
        figures=all_figures(found[0].figures, found[1].figures, groups, seed),
        rows=row_lines(sides, numbers, columns, found),
        names={"target": sides[0].name, "compare": sides[1].name},
        settings={"data": "the general set", "seed": seed, **settings},
    )
