"""What `preview` and `validate` print: the documents as they are on disk, marked by what is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from luthier.cli import main
from luthier.data.dataset import Document
from luthier.data.preview import document_text, show_report
from luthier.data.report import DataReport, length_histogram

ROWS = [{"instruction": f"Say {i}.", "output": f"{i} [b]!"} for i in range(20)]


@pytest.fixture
def config_path(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    toy_tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "run.yml"
    entry = f"datasets:\n  - path: {data}\n    type: alpaca\n"
    path.write_text(f"base_model: {tmp_path / 'model'}\nsequence_len: 256\n{entry}")
    return path


def document(pairs: list[tuple[list[int], bool]], lengths: tuple[int, ...] | None = None) -> Document:
    ids = [token for tokens, _ in pairs for token in tokens]
    labels = [token if trained else -100 for tokens, trained in pairs for token in tokens]
    return Document(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), lengths)


def test_a_preference_run_is_previewed_and_validated(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {i}.", "chosen": f" {i}!", "rejected": " No."} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yml").write_text(
        f"base_model: {tmp_path / 'model'}\nrl: dpo\nval_set_size: 2\ndatasets:\n  - path: {tmp_path / 'pairs.jsonl'}\n"
    )
    assert main(["preview", str(config_path), "--plain", "--rows", "1", "shuffle=false"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 4 pairs (train); dpo compares what is ⟦trained⟧" in shown
    assert "--- chosen\n⟦ " in shown
    assert "--- rejected\n⟦ No.<|endoftext|>⟧" in shown
    assert "tokens per answer with its prompt" in shown
    assert main(["validate", str(config_path), "rl=kto", "micro_batch_size=2"]) == 0
    shown = capsys.readouterr().out
    assert "4 desirable and 4 undesirable answers" in shown
    assert "config and data are fine" in shown


def test_plain_text_is_marked_without_ambiguity(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    def ids(text: str) -> list[int]:
        return toy_tokenizer.encode(text)

    eos = [toy_tokenizer.eos_token_id]
    doc = document([(ids("Say\tit.\n"), False), (ids(" ⟦it⟧\x1b[31m\x85") + eos, True), (ids("日"), False)])
    shown = document_text(doc, toy_tokenizer, plain=True)
    assert shown.plain == "Say\tit.\n⟦ \\u27e6it\\u27e7\\u001b[31m\\u0085<|endoftext|>⟧日"


def test_colours(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [toy_tokenizer.encode(text) for text in ("<|im_start|>", "ask", "answer", "<|im_end|>")]
    doc = document([(ids[0], False), (ids[1], False), (ids[2], True), (ids[3], True)])
    shown = document_text(doc, toy_tokenizer, plain=False)
    assert shown.plain == "<|im_start|>askanswer<|im_end|>"
    spans = [(shown.plain[span.start : span.end], span.style) for span in shown.spans]
    assert spans == [
        ("<|im_start|>", "magenta"),
        ("answer", "bold green"),
        ("<|im_end|>", "bold green underline"),
    ]


def test_characters_across_a_boundary_are_whole(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = toy_tokenizer.encode("\U0001f680")
    assert len(tokens) > 1
    doc = document([(tokens[:1], False), (tokens[1:], True)])
    assert document_text(doc, toy_tokenizer, plain=True).plain == "⟦\U0001f680⟧"


def test_spaces_that_a_decoder_strips_are_kept() -> None:
    """As in Llama 2: a stretch decoded on its own would lose its first space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "▁Say": 1, "▁it": 2, "▁now": 3}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert (
        document_text(document([([1], False), ([2, 3], True)]), tokenizer, plain=True).plain == "Say⟦ it now⟧"
    )


def test_packed_documents_are_apart(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    doc = document([(toy_tokenizer.encode("ab"), True)], lengths=(1, 1))
    assert document_text(doc, toy_tokenizer, plain=True).plain == "⟦a⟧\n--- next document of the row\n⟦b⟧"


def test_histogram() -> None:
    assert length_histogram(np.array([3, 3, 4, 9]), bins=3) == [(3, 5, 3), (6, 8, 0), (9, 9, 1)]
    assert length_histogram(np.array([7])) == [(7, 7, 1)]
    assert length_histogram(np.array([], dtype=np.int64)) == []
    lengths = np.random.default_rng(0).integers(1, 5000, 1000)
    bins = length_histogram(lengths)
    assert sum(count for _, _, count in bins) == 1000
    assert all(((lengths >= low) & (lengths <= high)).sum() == count for low, high, count in bins)
    out = io.StringIO()
    report = DataReport([], [], False, 0.0, histogram=[(3, 5, 3), (6, 8, 0), (9, 9, 1)])
    show_report(Console(file=out), report)
    assert out.getvalue().splitlines()[-3:] == [f"3-5  {'█' * 40} 3", "6-8", f"  9  {'█' * 14} 1"]


def test_preview(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(config_path), "--rows", "2", "--plain", "val_set_size=5"]) == 0
    out = capsys.readouterr().out
    assert "2 of 15 documents (train); the model learns to write what is ⟦trained⟧" in out
    assert out.count("### Response:⟦") == out.count(" [b]!<|endoftext|>⟧") == 2
    assert "20 rows, 20 documents" in out
    assert "tokens per training document" in out
    assert main(["preview", str(config_path), "--split", "validation", "--val_set_size", "5"]) == 0
    out = capsys.readouterr().out
    assert "3 of 5 documents (validation)" in out
    assert "from the cache" in out


def test_validate(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config_path), "seed=7"]) == 0
    out = capsys.readouterr().out
    assert "run.yml:2" in out
    assert "command line" in out
    assert "20 rows, 20 documents" in out
    assert out.endswith("config and data are fine\n")


@pytest.mark.parametrize(
    ("override", "status", "message"),
    [
        (["sequnce_len=3"], 2, "sequence_len"),
        (["datasets.0.type=alpacca"], 2, "no type `alpacca`"),
        (["datasets.0.path=missing.jsonl"], 1, "there is no such file"),
        (["model_type=LlamaForCausalLLM"], 2, "command line: model_type: transformers "),
        (["chat_template=chatmll"], 2, "command line: chat_template: there is no template named"),
        (
            ["datasets.0={path: rows.jsonl, type: chat_template, chat_template: chatmll}"],
            2,
            "command line: chat",
        ),
        (["eot_tokens=[a b]"], 2, "command line: eot_tokens: 'a b' is not one token"),
        (["datasets.0.field_output=answer"], 1, "rows.jsonl:1: `answer` is missing"),
        (["sequence_len=8"], 1, "nothing in it can be trained"),
    ],
)
def test_mistakes_have_their_status(
    override: list[str], status: int, message: str, config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("validate", "preview"):
        assert main([verb, str(config_path), *override]) == status
        assert message in capsys.readouterr().err


def test_no_validation_data(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(config_path), "--split", "validation"]) == 2
    assert "set val_set_size or test_datasets" in capsys.readouterr().err


def test_weights_are_not_needed(config_path: Path, capsys: Any) -> None:
    """There are none in the model folder, not even a config."""
    assert not list((config_path.parent / "model").glob("*.safetensors"))
    assert main(["validate", str(config_path)]) == 0
