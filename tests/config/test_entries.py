"""Mistakes inside a dataset entry: each is reported with its line, before any data is read."""

from __future__ import annotations

import pytest

from luthier.config import UserPreference

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


@pytest.mark.parametrize(
    ("rl", "text", "words"),
    [
        ("dpo", "type: chat_template", "with `rl: dpo` a row has answers to compare: write `chat_template.default`"),
        ("dpo", "type: alpaca", "write a mapping with `prompt_format`, or no `type` at all for rows with prompt,"),
        ("kto", "type: completion", "rows with prompt, completion and label; or take rl out"),
        ("dpo", "type: chatml.intl", "there is no type `chatml.intl`. Did you mean `chatml.intel`? Types: chat_"),
        ("dpo", "type: {format: '{instruction}'}", "With `rl: dpo` a format of your own has field_prompt, field_"),
        ("dpo", "field_label: good", "field_label does nothing with `rl: dpo`, whose rows have a chosen and"),
        ("orpo", "type: {completion_format: '{completion}'}", "completion_format: completion_format is for `rl: kto`"),
        ("kto", "field_completion: a\n    field_chosen: b", "field_chosen is for rows with two answers"),
        (
            "kto",
            "type: {completion_format: '{completion}', chosen_format: '{chosen}'}",
            "type.chosen_format: chosen_format is for rows with two answers",
        ),
        ("dpo", "roles_to_train: [user]\n    type: chat_template.default", "roles_to_train does nothing with `rl"),
        ("dpo", "field_prompt: q\n    type: chat_template.default", "field_messages names the column of the prompt"),
        ("dpo", "field_messages: q", "field_messages does nothing with rows without a type"),
        ("dpo", "chat_template: chatml\n    type: chatml.intel", "chat_template does nothing with this type"),
        ("dpo", "field_chosen: a\n    type: zephyr.nectar", "field_chosen does nothing with this type"),
        ("dpo", "prompt_format: '{prompt}'\n    type: chatml.intel", "it goes with `user_defined.default`"),
        ("dpo", "train_on_inputs: true", "does nothing with `rl: dpo`, which never trains prompts. Leave it out."),
        ("dpo", "type: {prompt_format: 'Q: {question}'}", "type.prompt_format: {question} is not one of the places"),
        ("dpo", "type: {prompt_format: '{system}'}", "there is no {prompt} in it, so each row would be the same"),
        ("dpo", "prompt_format: 'Q'\n    type: user_defined.default", "prompt_format: there is no {prompt} in it"),
        ("dpo", "field_prompt: q\n    type: {field_prompt: r}", "field_prompt is in `type` as well"),
        (
            "dpo",
            "message_field_role: who\n    message_property_mappings: {role: from}",
            "message_property_mappings names another role",
        ),
    ],
)
def test_flaws_of_preference_entries(report, rl, text, words):
    (line,) = report(f"    {text}\nrl: {rl}\nmicro_batch_size: 2\n", base=HEAD)
    assert line.startswith(("cfg.yml:4: datasets.0.", "cfg.yml:5: datasets.0."))
    assert words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("type: chat_template.default", "`chat_template.default` is for preference tuning: set `rl` (orpo, dpo, ipo, "),
        ("type: {chosen_format: '{chosen}'}", "a format for preference runs is for preference tuning: set `rl`"),
        ("field_chosen: a\n    type: alpaca", "field_chosen is for preference tuning: set `rl`"),
    ],
)
def test_preference_entries_need_a_method(report, text, words):
    (line,) = report(f"    {text}\n", base=HEAD)
    assert line.startswith("cfg.yml:4: datasets.0.")
    assert words in line
    # A method that is misspelt is one mistake, not two.
    (line,) = report(f"    {text}\nrl: dppo\n", base=HEAD)
    assert "rl: expected" in line


@pytest.mark.parametrize("rl", ["orpo", "dpo", "ipo", "simpo", "kto"])
def test_preference_entries(load, rl):
    for text in (
        "field_prompt: q\n    field_chosen: a\n    field_tools: t\n    chat_template: chatml\n    roles: {user: [me]}",
        "type: {field_prompt: q, field_chosen: a, prompt_format: '{system}|{prompt}', chosen_format: '{chosen}'}",
        "type: user_defined.default\n    field_prompt: q\n    rejected_format: '{rejected}{{}}'",
        "type: chatml.ultra\n    field_system: s\n    message_field_role: from",
        "type: zephyr.nectar\n    field_prompt: q",
    ):
        config = load(f"    {text}\nrl: {rl}\nmicro_batch_size: 2\n", base=HEAD)
        # What a run writes down of its config says the same when it is read again.
        assert load(config.to_yaml(), base="").data.datasets == config.data.datasets
    (entry,) = load("    type: {prompt_format: '{prompt}'}\nrl: dpo\n", base=HEAD).data.datasets
    assert isinstance(entry.type, UserPreference)
    load("    train_on_inputs: true\nrl: orpo\n", base=HEAD)


def test_flaws_are_in_the_report_with_the_rest(report):
    lines = report("    type: alpacca\nlora_r: 8\ntest_datasets: [{path: e, field: x}]\n", base=HEAD)
    assert [line.partition(": ")[0] for line in lines] == ["cfg.yml:4", "cfg.yml:5", "cfg.yml:6"]
    assert "test_datasets.0.field" in lines[2]


def test_train_on_inputs_at_the_top_level_counts_too(report, load):
    text = "    type: chat_template\n    roles_to_train: [user]\ntrain_on_inputs: true\n"
    (line,) = report(text, base=HEAD)
    assert line.startswith("cfg.yml:5: ")
    load(text.replace("[user]", "[user]\n    train_on_inputs: false"), base=HEAD)
