"""Mistakes inside a dataset entry: each is reported with its line, before any data is read."""

from __future__ import annotations

import pytest

HEAD = "base_model: m\ndatasets:\n  - path: d.jsonl\n"  # three lines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "type: alpacca",
            "datasets.0.type: there is no type `alpacca`. Did you mean `alpaca`? Types: alpaca, ",
        ),
        ("type: sharegpt", "Write `chat_template`"),
        ("roles_to_train: [user]\n    type: alpaca", "roles_to_train does nothing with this type"),
        ("field_output: a\n    type: chat_template", "goes with prompts with an answer"),
        ("field: x\n    type: alpaca", "goes with `type: completion` and `type: input_output`"),
        ("labels_shifted: true\n    type: alpaca", "goes with rows that are tokens already"),
        ("field_messages: x", "does nothing with rows of tokens"),
        ("train_on_inputs: true\n    type: completion", "train_on_inputs does nothing with this type"),
        (
            "train_on_eos: last\n    type: chat_template\n    train_on_inputs: true",
            "trains whole conversations",
        ),
        ("type: {system_prompt: x}", "needs `format`"),
        ("type: {field: body, format: x}", "format does nothing beside `field`"),
        ("field: a\n    type: {field: body}", "field is in `type` as well"),
        ("field_input: a\n    type: {format: '{input}', field_input: b}", "field_input is in `type` as well"),
        ("type: {format: 'Q: {question}'}", "{question} is not one of the places"),
        ("type: {format: 'Q: {}'}", "is not one of the places"),
        ("type: {format: 'Q: {instruction!r}'}", "is not one of the places"),
        ("type: {format: 'Q: {instruction'}", "A brace that is text is written twice"),
        ("type: {format: 'Q:'}", "neither {instruction} nor {input}"),
        (
            "type: {format: '{instruction}', no_input_format: '{input}'}",
            "no_input_format: {input} is not one",
        ),
        ("type: {format: '{instruction}', system_format: '{sys} {system}'}", "{sys} is not one"),
        ("type: {format: '{instruction}', system_format: 'x'}", "no {system} in it"),
        ("type: {format: '{output} {instruction}'}", "{output} can be there once, behind all other places"),
    ],
)
def test_flaws(report, text, words):
    (line,) = report(f"    {text}\n", base=HEAD)
    assert line.startswith("cfg.yml:4: datasets.0.")
    assert words in line


def test_flaws_are_in_the_report_with_the_rest(report):
    lines = report("    type: alpacca\nlora_r: 8\ntest_datasets: [{path: e, field: x}]\n", base=HEAD)
    assert [line.partition(": ")[0] for line in lines] == ["cfg.yml:4", "cfg.yml:5", "cfg.yml:6"]
    assert "test_datasets.0.field" in lines[2]


def test_train_on_inputs_at_the_top_level_counts_too(report, load):
    text = "    type: chat_template\n    roles_to_train: [user]\ntrain_on_inputs: true\n"
    (line,) = report(text, base=HEAD)
    assert line.startswith("cfg.yml:5: ")
    load(text.replace("[user]", "[user]\n    train_on_inputs: false"), base=HEAD)
