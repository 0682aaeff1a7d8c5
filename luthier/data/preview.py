"""The verbs `preview` and `validate`: the data as it will be trained, before anything is trained.

`preview` shows documents token for token as the model will see them, decoded from the ids on disk:
trained text in colour (or between ⟦ and ⟧), special tokens as they are. `validate` checks the config and all
of its data, and loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from luthier.config import Config
from luthier.config.convert.command import config_of
from luthier.data.report import DataReport
from luthier.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.data.dataset import Document, PreparedData, TokenDataset

OPEN, CLOSE = "⟦", "⟧"
_TRAINED = "bold green"
_SPECIAL = "magenta"
_BAR = 40  # characters of the histogram's longest bar

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value or --key value, for any key of the config.")
]


def preview(
    config: ConfigArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="How many documents to show.")] = 3,
    plain: Annotated[
        bool, typer.Option("--plain", help=f"No colour: trained text stands between {OPEN} and {CLOSE}.")
    ] = False,
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which documents to show.")] = "train",
) -> None:
    """Show rows as they will be trained, token for token, and what became of the others."""
    loaded = config_of(config, overrides or [])
    if split == "validation" and not (loaded.data.val_set_size or loaded.data.test_datasets):
        raise ConfigError("--split validation: there is none; set val_set_size or test_datasets.")
    console = Console(highlight=False, soft_wrap=True, no_color=plain or None)
    plain = plain or not console.is_terminal or console.no_color
    prepared, tokenizer = _prepare(loaded)
    dataset = prepared.train if split == "train" else prepared.validation
    assert dataset is not None
    marked = f"{OPEN}trained{CLOSE}" if plain else "[bold green]trained[/]"
    shown = min(rows, len(dataset))
    rl = loaded.preference.rl
    learns = "the model learns to write what is" if rl is None else f"{rl} compares what is"
    console.print(f"{shown} of {len(dataset):,} {prepared.report.unit} ({split}); {learns} {marked}")
    for index in range(shown):
        _show_document(console, dataset, index, tokenizer, plain)
    show_report(console, prepared.report)


def validate(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Check a config and its data without loading weights, and show each value with where it comes from."""
    from luthier.config.show import show_config

    loaded = config_of(config, overrides or [])
    console = Console(highlight=False, soft_wrap=True)
    show_config(loaded, console)
    prepared, _ = _prepare(loaded)
    console.print()
    show_report(console, prepared.report)
    console.print("config and data are fine")


def _check_model_type(config: Config) -> None:
    """Training would find it as well, but only once it loads the model."""
    import transformers

    name = config.model.model_type
    if not hasattr(transformers, name):
        raise ConfigError(
            f"{config.place('model_type')}model_type: transformers {transformers.__version__} has no model class "
            f"{name!r}"
        )


def _prepare(config: Config) -> tuple[PreparedData, PreTrainedTokenizerBase]:
    # Imported here, so that a mistake in the config is said before transformers is loaded.
    from luthier.data.mixed import mix_of_run
    from luthier.data.stream.prepare import prepare
    from luthier.data.tokenizer import load_tokenizer

    _check_model_type(config)
    tokenizer = load_tokenizer(config)
    prepared = prepare(config, tokenizer)
    prepared.report.mix = mix_of_run(config, prepared)
    return prepared, tokenizer


# --- documents ----------------------------------------------------------------------------------------------


def _show_document(
    console: Console, dataset: TokenDataset, index: int, tokenizer: PreTrainedTokenizerBase, plain: bool
) -> None:
    document = dataset[index]
    tokens, trained = int(dataset.lengths[index]), int(dataset.trained[index])
    title = f"--- {dataset.location(index)}: {tokens:,} tokens, {trained:,} trained"
    console.print()
    if document.prompt:
        console.print(f"{title}, {document.prompt:,} in the prompt", style="dim", markup=False)
        console.print(answers_text(document, tokenizer, plain))
        return
    if document.lengths:
        title += f", packed from {len(document.lengths)} documents"
    console.print(title, style="dim", markup=False)
    console.print(document_text(document, tokenizer, plain))


def answers_text(document: Document, tokenizer: PreTrainedTokenizerBase, plain: bool) -> Text:
    """The prompt once, and below it each of a pair's answers, or the one with its label."""
    lengths = document.lengths or (len(document.input_ids),)
    label = "desirable" if document.desirable else "undesirable"
    names = ("chosen", "rejected") if document.pair else (label,)
    shown = Text()
    start = 0
    for name, length in zip(names, lengths, strict=True):
        ids = document.input_ids[start : start + length].tolist()
        trained = (document.labels[start : start + length] != -100).tolist()
        pieces = list(_pieces(ids, trained, tokenizer, document.prompt))
        before = next(at for at in range(len(pieces) + 1) if at == len(pieces) or pieces[at][3])
        if not start:
            _append_marked(shown, [piece[:3] for piece in pieces[:before]], plain)
        shown.append(f"\n--- {name}\n", style="dim")
        _append_marked(shown, [piece[:3] for piece in pieces[before:]], plain)
        start += length
    return shown


def document_text(document: Document, tokenizer: PreTrainedTokenizerBase, plain: bool) -> Text:
    """The document's text, marked by what is trained; packed documents are apart by a line."""
    shown = Text()
    start = 0
    for number, length in enumerate(document.lengths or (len(document.input_ids),)):
        if number:
            shown.append("\n--- next document of the row\n", style="dim")
        ids = document.input_ids[start : start + length].tolist()
        trained = (document.labels[start : start + length] != -100).tolist()
        _append_marked(shown, [piece[:3] for piece in _pieces(ids, trained, tokenizer)], plain)
        start += length
    return shown


def _append_marked(shown: Text, pieces: Sequence[tuple[str, bool, bool]], plain: bool) -> None:
    for is_trained, stretch in groupby(pieces, key=lambda piece: piece[1]):
        if plain and is_trained:
            shown.append(OPEN)
        for text, _, special in stretch:
            style = _TRAINED if is_trained else _SPECIAL if special else ""
            shown.append(
                _visible(text, plain), style=f"{style} underline" if special and is_trained else style
            )
        if plain and is_trained:
            shown.append(CLOSE)


def _pieces(
    ids: Sequence[int], trained: Sequence[bool], tokenizer: PreTrainedTokenizerBase, prompt: int = 0
) -> Iterator[tuple[str, bool, bool, bool]]:
    """Stretches of text as (text, trained, special token, behind the prompt); together they are the decoded whole.

    A tokenizer may decode a stretch differently on its own (without its leading space), so a stretch's text
    is what it adds to the text of everything before it. Where a character's bytes lie on both sides of a
    boundary, the whole character goes to the side that completes it.
    """
    special = set(tokenizer.all_special_ids)
    start, before = 0, ""
    kinds = zip(
        trained, (token in special for token in ids), (at >= prompt for at in range(len(ids))), strict=True
    )
    for (is_trained, is_special, behind), group in groupby(kinds):
        stop = start + len(list(group))
        whole = _decode(ids[:stop], tokenizer)
        whole = whole.rstrip("\ufffd") if stop < len(ids) else whole
        if whole.startswith(before):
            yield whole[len(before) :], is_trained, is_special, behind
        else:  # what follows changed the text before it: show the stretch as it is alone
            yield _decode(ids[start:stop], tokenizer), is_trained, is_special, behind
        start, before = stop, whole


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


def _visible(text: str, plain: bool) -> str:
    """Control characters by their code, so that a terminal shows them and does not obey them."""
    shown = "".join(char if char.isprintable() or char in "\n\t" else f"\\u{ord(char):04x}" for char in text)
    return shown.replace(OPEN, r"\u27e6").replace(CLOSE, r"\u27e7") if plain else shown


# --- counts -------------------------------------------------------------------------------------------------


def show_report(console: Console, report: DataReport) -> None:
    """The report's lines, and the lengths of the training documents as a histogram."""
    console.print()
    for line in report.lines():
        console.print(line, markup=False)
    if not report.histogram:
        return
    what = "training document" if report.unit == "documents" else "answer with its prompt"
    console.print(f"\ntokens per {what}")
    most = max(count for _, _, count in report.histogram)
    left = max(len(f"{low:,}-{high:,}") for low, high, _ in report.histogram)
    for low, high, count in report.histogram:
        bar = "█" * (-(-count * _BAR // most))
        name = f"{low:,}-{high:,}" if high > low else f"{low:,}"
        console.print(f"{name:>{left}}  {bar} {count:,}" if count else f"{name:>{left}}", markup=False)
