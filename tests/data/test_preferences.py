"""Preference data: rows to prompts and answers, and these to tokens, held against TRL where it does the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from luthier.config import Config, DatasetEntry, UserPreference
from luthier.config.datasets import PREFERENCE_NAMES
from luthier.config.preference_types import PREFERENCE_TYPES
from luthier.data.dataset import PreparedData, prepare
from luthier.data.examples import PreferenceExample
from luthier.data.formats import columns_of, prompt_example
from luthier.data.lengths import cut_answers
from luthier.data.loader import StepLoader
from luthier.data.preferences import LeftOut, preference_examples
from luthier.data.preview import answers_text
from luthier.data.render import Renderer
from luthier.data.report import Balance
from luthier.errors import DataError
from luthier.evaluate.samples import validation_prompts
from tests.conftest import SHARED_DATA

Row = dict[str, Any]
Prepare = Callable[..., PreparedData]

ASK = [{"role": "user", "content": "Add 1 and 2."}]
GOOD, BAD = "It is 3.", "It is 4!"


def said(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def entry(**keys: Any) -> DatasetEntry:
    return DatasetEntry(path="rows.jsonl", **keys)


def examples(row: Row, rl: str = "dpo", notes: Counter[str] | None = None, **keys: Any) -> list[PreferenceExample]:
    return preference_examples(row, entry(**keys), rl, Counter() if notes is None else notes)


def only(row: Row, rl: str = "dpo", **keys: Any) -> PreferenceExample:
    (example,) = examples(row, rl, **keys)
    return example


@pytest.fixture
def prepared(tmp_path: Path, toy_tokenizer: Any) -> Prepare:
    """prepared(rows, rl, entry keys, tokenizer, **config): the whole way from a file to tokens."""

    def make(
        rows: list[Row] | Path,
        rl: str = "dpo",
        keys: dict[str, Any] | None = None,
        tokenizer: Any = None,
        **flat: Any,
    ) -> PreparedData:
        path = rows if isinstance(rows, Path) else tmp_path / "rows.jsonl"
        if not isinstance(rows, Path):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        flat = {"micro_batch_size": 2, "dataset_processes": 1, **flat}
        config = Config.from_flat(
            {"base_model": "toy", "datasets": [{"path": str(path), **(keys or {})}], "rl": rl, **flat}
        )
        return prepare(config, tokenizer or toy_tokenizer)

    return make


def sides(data: PreparedData, index: int = 0) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of a document's parts."""
    document = data.train[index]
    ends = np.cumsum(document.lengths or (len(document.input_ids),))[:-1]
    parts = zip(np.split(document.input_ids, ends), np.split(document.labels, ends), strict=True)
    return [(ids.tolist(), labels.tolist()) for ids, labels in parts]


# --- tokens, against TRL


def of_trl(trainer: str, rows: list[Row], tokenizer: Any) -> list[Row]:
    """The rows as TRL's trainer prepares them: prompt_ids and chosen_ids, rejected_ids or completion_ids."""
    import trl
    from datasets import Dataset

    owner = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    prepared = getattr(trl, trainer)._prepare_dataset(owner, Dataset.from_list(rows), tokenizer, args, "train")
    return list(prepared)


TEXT_ROWS = [
    {"prompt": "Q: Add 1 and 2.\nA:", "chosen": " It is 3.", "rejected": " It is 4!"},
    {"prompt": "Once upon", "chosen": " a time", "rejected": " a mattress<|endoftext|>"},
    {"prompt": "日本語", "chosen": " naïve \U0001f600", "rejected": "\n\n"},
    {"prompt": "Say nothing.", "chosen": "", "rejected": " something"},
]


@pytest.mark.parametrize("bos", [False, True])
def test_text_pairs_are_trls(prepared: Prepare, with_bos: Any, toy_tokenizer: Any, bos: bool) -> None:
    tokenizer = with_bos if bos else toy_tokenizer
    data = prepared(TEXT_ROWS, tokenizer=tokenizer)
    for index, theirs in enumerate(of_trl("DPOTrainer", TEXT_ROWS, tokenizer)):
        prompt = theirs["prompt_ids"]
        assert data.train.prompts[index] == len(prompt)
        for name, (ids, labels) in zip(("chosen", "rejected"), sides(data, index), strict=True):
            answer = theirs[f"{name}_ids"]
            assert ids == prompt + answer
            assert labels == [-100] * len(prompt) + answer
        assert data.train.chosen[index] == len(theirs["chosen_ids"])
        assert (data.train[index].input_ids[0] == tokenizer.bos_token_id) == bos


@pytest.fixture(scope="session")
def with_bos(toy_tokenizer: Any) -> Any:
    """The toy tokenizer with a BOS that it puts before each text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(toy_tokenizer.backend_tokenizer.to_str())
    core.add_special_tokens(["<s>"])
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|endoftext|>")


def test_text_pairs_are_those_of_trls_orpo(prepared: Prepare, with_bos: Any) -> None:
    from trl.experimental.orpo import ORPOTrainer

    rows = TEXT_ROWS[:3]
    owner: Any = SimpleNamespace(processing_class=with_bos, is_encoder_decoder=False, max_length=512)
    owner.build_tokenized_answer = lambda *texts: ORPOTrainer.build_tokenized_answer(owner, *texts)
    data = prepared(rows, "orpo", tokenizer=with_bos)
    for index, row in enumerate(rows):
        theirs = ORPOTrainer.tokenize_row(owner, row)
        (chosen, labels), (rejected, rejected_labels) = sides(data, index)
        assert (chosen, rejected) == (theirs["chosen_input_ids"], theirs["rejected_input_ids"])
        assert rejected_labels == theirs["rejected_labels"]
        assert labels == [-100, *chosen[1:]]  # of the likelihood, TRL's is over prompt and answer
    bare = prepared(rows, "orpo", tokenizer=with_bos, train_on_inputs=False)
    assert sides(bare)[0][1] == ORPOTrainer.tokenize_row(owner, rows[0])["chosen_labels"]
    assert sides(prepared(rows, "orpo", {"train_on_inputs": False}, with_bos))[0][1] == sides(bare)[0][1]


def test_unpaired_text_is_trls(prepared: Prepare, toy_tokenizer: Any) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected"], "label": bool(at % 2)}
        for at, row in enumerate(TEXT_ROWS)
    ]
    data = prepared(rows, "kto")
    for index, theirs in enumerate(of_trl("KTOTrainer", rows, toy_tokenizer)):
        ((ids, labels),) = sides(data, index)
        assert ids == theirs["prompt_ids"] + theirs["completion_ids"]
        assert labels == [-100] * len(theirs["prompt_ids"]) + theirs["completion_ids"]
    assert data.train.desirable.tolist() == [0, 1, 0, 1]
    assert not data.train.chosen.any()


@pytest.mark.parametrize("rows_per_step", [1, 2, 3, 4])
def test_mismatched_answers_are_of_other_rows(prepared: Prepare, rows_per_step: int) -> None:
    """In the last step of an epoch too, which may have a single row."""
    train = prepared([{"prompt": f"Q {at}?", "completion": f" A {at}!", "label": True} for at in range(7)], "kto").train
    answers = {tuple(train[row].input_ids[train[row].prompt :].tolist()): row for row in range(7)}
    loader = StepLoader(train, rows_per_step=rows_per_step, tokens_per_pass=1, seed=0, shuffle=True)
    for index in range(loader.steps_per_epoch):
        step = loader.step(index)
        for batch in loader.mismatched(step, torch.device("cpu")):
            (row,) = batch.rows
            ids = batch.input_ids.tolist()
            assert ids[: train[row].prompt] == train[row].input_ids[: train[row].prompt].tolist()
            other = answers[tuple(ids[train[row].prompt :])]
            assert other != row
            assert len(step.rows) == 1 or other in step.rows


def test_whole_texts_have_trls_tokens_and_whole_words(prepared: Prepare, toy_tokenizer: Any) -> None:
    rows = [
        {"chosen": "Human: Hi\n\nAssistant: I do", "rejected": "Human: Hi\n\nAssistant: It is"},
        {"chosen": "Q: yes or no?\nYes", "rejected": "Q: yes or no?\nYou"},
        {"chosen": "It is well", "rejected": "It is well known"},
    ]
    data = prepared(rows)
    prompts = ["Human: Hi\n\nAssistant:", "Q: yes or no?\n", "It is"]
    for index, theirs in enumerate(of_trl("DPOTrainer", rows, toy_tokenizer)):
        (chosen, _), (rejected, _) = sides(data, index)
        assert chosen == theirs["prompt_ids"] + theirs["chosen_ids"]
        assert rejected == theirs["prompt_ids"] + theirs["rejected_ids"]
        assert toy_tokenizer.decode(chosen[: data.train.prompts[index]]) == prompts[index]
    kto = prepared(rows[:1], "kto")
    assert sides(kto, 0)[0] == sides(data)[0]
    assert sides(kto, 1)[0] == sides(data)[1]


def chats() -> list[Row]:
    system = [{"role": "system", "content": "Be brief."}]
    longer = [*ASK, *said("It is 3."), {"role": "user", "content": "And twice that?"}]
    return [
        {"prompt": ASK, "chosen": said(GOOD), "rejected": said(BAD)},
        {"prompt": [*system, *longer], "chosen": said("6"), "rejected": said("7\n")},
        {"chosen": longer + said("6"), "rejected": longer + said("Seven.")},
    ]


FAMILIES = ("qwen2_5", "qwen3", "llama3", "gemma", "phi3", "gptoss", "gptoss_training", "cohere")


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_are_transformers_own(
    prepared: Prepare, tokenizer_with: Any, trl_templates: dict[str, str], family: str
) -> None:
    tokenizer = tokenizer_with(trl_templates[family])
    rows = chats()
    if family == "gemma":
        rows[1]["prompt"] = rows[1]["prompt"][1:]  # its template has no system text
    data = prepared(rows, tokenizer=tokenizer)
    for index, row in enumerate(rows):
        prompt = row.get("prompt", row["chosen"][:-1])
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for name, (ids, labels) in zip(("chosen", "rejected"), sides(data, index), strict=True):
            whole = row[name] if "prompt" not in row else prompt + row[name]
            full = tokenizer.apply_chat_template(whole, return_dict=False)
            assert ids == full[: len(ids)]
            assert ids[: data.train.prompts[index]] == full[: len(asked)] == asked
            answer = tokenizer.decode([label for label in labels if label != -100])
            assert whole[-1]["content"].strip() in answer
            assert all(label == -100 for label in labels[: len(asked)])
            assert labels[-1] != -100  # what the template puts behind the end of the turn is no part of it


def test_conversations_are_trls(prepared: Prepare, toy_tokenizer: Any) -> None:
    rows = chats()
    for some in (rows[:2], rows[2:]):  # TRL takes columns from the first row
        data = prepared(some)
        for index, theirs in enumerate(of_trl("DPOTrainer", some, toy_tokenizer)):
            assert data.train.prompts[index] == len(theirs["prompt_ids"])
            for name, (ids, _) in zip(("chosen", "rejected"), sides(data, index), strict=True):
                full = theirs["prompt_ids"] + theirs[f"{name}_ids"]
                assert ids == full[: len(ids)]
                assert toy_tokenizer.decode(full[len(ids) :]) == "\n"


def test_everything_behind_the_common_beginning_is_compared(prepared: Prepare, toy_tokenizer: Any) -> None:
    chosen = [*ASK, *said("3"), {"role": "user", "content": "Sure?"}, *said("Yes.")]
    data = prepared([{"chosen": chosen, "rejected": [*ASK, *said("4")]}])
    (ids, labels), (other, other_labels) = sides(data)
    prompt = int(data.train.prompts[0])
    assert toy_tokenizer.decode(ids[:prompt]) == "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n"
    assert toy_tokenizer.decode([label for label in labels if label != -100]) == "3<|im_end|>Yes.<|im_end|>"
    assert toy_tokenizer.decode(other[prompt:]) == "4<|im_end|>"
    assert other_labels[prompt:] == other[prompt:]
    (note,) = [note for note in data.report.sources[0].notes if "before their last turn" in note]
    assert data.report.sources[0].notes[note].count == 1


def test_conversations_that_part_at_a_question_go_back_to_the_answer_before() -> None:
    again = [{"role": "user", "content": "Why?"}, *said("So.")], [{"role": "user", "content": "How?"}, *said("Thus.")]
    row = {"chosen": [*ASK, *said("3"), *again[0]], "rejected": [*ASK, *said("3"), *again[1]]}
    example = only(row)
    assert example.prompt == ASK
    assert [len(answer) for answer in example.answers] == [3, 3]


def test_tools_and_calls_go_through_the_template(
    prepared: Prepare, tokenizer_with: Any, trl_templates: dict[str, str]
) -> None:
    tokenizer = tokenizer_with(trl_templates["qwen3"])
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
    row = {"prompt": ASK, "chosen": [call], "rejected": said(BAD), "tools": json.dumps([tool])}
    data = prepared([row], tokenizer=tokenizer)
    (ids, labels), (other, _) = sides(data)
    full = {"type": "function", "function": tool}
    called = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    wanted = {**call, "content": "", "tool_calls": [called]}
    assert ids == tokenizer.apply_chat_template([*ASK, wanted], tools=[full], return_dict=False)[: len(ids)]
    assert '"arguments": {"a": 1}' in tokenizer.decode([label for label in labels if label != -100])
    assert '"name": "add"' in tokenizer.decode(other[: data.train.prompts[0]])


# --- types

CHATML = "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n"
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\nAdd 1 and 2.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
SYSTEMS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
}
TEXTS = {"chosen": GOOD, "rejected": BAD}
WHOLE = {"chosen": ASK + said(GOOD), "rejected": ASK + said(BAD)}
TURNS_ROWS: list[tuple[str, Row]] = [
    ("", {"instruction": "Add 1 and 2.", **TEXTS}),
    ("default", {"instruction": "Add 1 and 2.", **TEXTS}),
    ("argilla", {"instruction": "Add 1 and 2.", "chosen_response": GOOD, "rejected_response": BAD}),
    ("argilla", {"question": "Add 1 and 2.", **TEXTS}),
    ("argilla_chat", WHOLE),
    ("icr", {"input": "Add 1 and 2.", **TEXTS}),
    ("intel", {"question": "Add 1 and 2.", **TEXTS}),
    ("prompt_pairs", {"prompt": "Add 1 and 2.", **TEXTS}),
    ("ultra", {"prompt": "Add 1 and 2.", **WHOLE}),
]


@pytest.mark.parametrize("style", ["chatml", "llama3"])
@pytest.mark.parametrize(("name", "row"), TURNS_ROWS)
def test_turns_are_axolotls(style: str, name: str, row: Row) -> None:
    prompt, end = (CHATML, "<|im_end|>") if style == "chatml" else (LLAMA3, "<|eot_id|>")
    kind = f"{style}.{name}" if name else style
    example = only(row, type=kind)
    assert (example.prompt, example.answers) == (prompt, (GOOD + end, BAD + end))
    example = only({**row, "system": "Be brief."}, type=kind)
    assert example.prompt == SYSTEMS[style] + prompt
    assert columns_of(entry(type=kind), "dpo") >= set(row) | {"system"}
    good, bad = examples(row, "kto", type=kind)
    assert (good.desirable, bad.desirable) == (True, False)
    assert (good.answers, bad.answers) == ((GOOD + end,), (BAD + end,))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("argilla", {"instruction": "Add 1 and 2.", "completion": GOOD}),
        ("argilla_chat", {"completion": ASK + said(GOOD)}),
        ("intel", {"question": "Add 1 and 2.", "completion": GOOD}),
        ("prompt_pairs", {"prompt": "Add 1 and 2.", "completion": GOOD}),
        ("ultra", {"prompt": "Add 1 and 2.", "completion": GOOD}),
    ],
)
def test_turns_of_labelled_answers(name: str, row: Row) -> None:
    for label in (True, False, 1, 0):
        example = only({**row, "label": label}, "kto", type=f"chatml.{name}")
        assert (example.prompt, example.answers) == (CHATML, (GOOD + "<|im_end|>",))
        assert example.desirable is bool(label)


def test_ranked_answers() -> None:
    answers = [{"answer": text, "rank": rank} for text, rank in (("b", 2.0), ("worst", 7.0), ("best", 1.0))]
    notes: Counter[str] = Counter()
    (example,) = examples({"prompt": "Hi", "answers": answers}, notes=notes, type="zephyr.nectar")
    assert example.prompt == "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert example.answers == ("best", "worst")
    assert sum(notes.values()) == 1


@pytest.mark.parametrize(
    ("keys", "row"),
    [
        ({"type": "chat_template.default"}, {"messages": ASK, **TEXTS}),
        ({"type": "chat_template.default"}, {"messages": ASK, "chosen": said(GOOD)[0], "rejected": said(BAD)}),
        ({"type": "chat_template.default"}, {"conversations": ASK, **WHOLE}),
        ({"type": "chat_template.default", "field_messages": "prompt"}, {"prompt": "Add 1 and 2.", **WHOLE}),
        (
            {
                "type": "chat_template.default",
                "field_messages": "dialog",
                "field_chosen": "good",
                "field_rejected": "bad",
                "message_field_role": "who",
                "message_property_mappings": {"content": "what"},
                "roles": {"user": ["asker"], "assistant": ["helper"]},
            },
            {
                "dialog": [{"who": "asker", "what": "Add 1 and 2."}],
                "good": {"who": "helper", "what": GOOD},
                "bad": {"who": "helper", "what": BAD},
            },
        ),
        ({"type": "chat_template.argilla"}, {"prompt": "Add 1 and 2.", **WHOLE}),
        ({"type": "chat_template.argilla"}, WHOLE),
        ({"type": "chat_template.argilla_chat"}, WHOLE),
        ({}, {"prompt": "Add 1 and 2.", "chosen": said(GOOD), "rejected": said(BAD)}),
        ({}, WHOLE),
        ({"field_prompt": "q"}, {"q": ASK, **TEXTS}),
        ({"type": "passthrough.default"}, {"prompt": ASK, **TEXTS}),
    ],
)
def test_conversations_of_every_kind(keys: Row, row: Row) -> None:
    example = only(row, **keys)
    assert (example.prompt, example.answers) == (ASK, (said(GOOD), said(BAD)))
    system = {"role": "system", "content": "Be brief."}
    example = only({**row, "s": "Be brief."}, field_system="s", **keys)
    assert example.prompt == [system, *ASK]
    assert columns_of(entry(**keys), "dpo") >= set(row)


def test_labelled_conversations() -> None:
    kind = {"type": "chat_template.default"}
    rows: list[tuple[Row, Row]] = [
        ({"messages": ASK + said(GOOD), "label": False}, kind),
        ({"messages": ASK, "completion": GOOD, "label": False}, kind),
        ({"prompt": ASK, "completion": said(GOOD), "label": False}, {}),
        ({"completion": ASK + said(GOOD), "label": False}, {}),
        ({"q": ASK, "a": said(GOOD), "ok": 0}, {"field_prompt": "q", "field_completion": "a", "field_label": "ok"}),
    ]
    for row, keys in rows:
        example = only(row, "kto", **keys)
        assert (example.prompt, example.answers, example.desirable) == (ASK, (said(GOOD),), False)


def test_a_systems_message_in_one_column_only_is_kept() -> None:
    system = [{"role": "system", "content": "Be brief."}]
    row = {"prompt": "Add 1 and 2. ", "chosen": [*system, *ASK, *said(GOOD)], "rejected": said(BAD)}
    assert only(row).prompt == [*system, {"role": "user", "content": "Add 1 and 2. "}]


def test_whole_conversations_beside_their_prompt() -> None:
    longer = [*ASK, *said("3"), {"role": "user", "content": "And twice that?"}]
    row = {"chosen": longer + said("6"), "rejected": longer + said("7")}
    system = {"role": "system", "content": "Be brief."}
    for prompt, wanted, others in (
        ("Add 1 and 2.", longer, 0),
        ("And twice that? ", longer, 0),
        ("Human: Add 1 and 2.", longer, 1),  # said in another form: the conversations are what is taken
        (ASK, longer, 0),
        ([system, *ASK], [system, *longer], 0),
    ):
        for keys in ({}, {"type": "chat_template.argilla"}):
            notes: Counter[str] = Counter()
            (example,) = examples({"prompt": prompt, **row}, notes=notes, **keys)
            assert (example.prompt, example.answers) == (wanted, (said("6"), said("7")))
            assert notes.total() == others
    for prompt in (said("x") + ASK, [*longer, *said("6"), *ASK]):
        with pytest.raises(DataError, match="`chosen` and `rejected` are whole conversations that do not begin with"):
            examples({"prompt": prompt, **row})
    other = {"role": "system", "content": "Be long."}
    with pytest.raises(DataError, match="another system text"):
        examples({"prompt": [system, *ASK], **{name: [other, *side] for name, side in row.items()}})


def test_formats_of_ones_own() -> None:
    own = UserPreference(
        field_prompt="q",
        field_system="s",
        field_chosen="good",
        prompt_format="[{system}] {prompt} {{}}:",
        chosen_format=" {chosen}.",
        rejected_format=" {rejected}?",
    )
    row = {"q": "Add {x}", "s": "brief", "good": "3", "rejected": "4"}
    example = only(row, type=own)
    assert (example.prompt, example.answers) == ("[brief] Add {x} {}:", (" 3.", " 4?"))
    assert only({**row, "s": None}, type=own).prompt == "[] Add {x} {}:"
    beside = {name: value for name, value in own if value}
    assert only(row, type="user_defined.default", **beside) == example
    plain = only({"prompt": "a", "chosen": "b", "rejected": "c"}, type=UserPreference())
    assert (plain.prompt, plain.answers) == ("a", ("b", "c"))
    kto = UserPreference(field_completion="a", field_label="ok", completion_format=" {completion}!")
    example = only({"prompt": "q", "a": "b", "ok": True}, "kto", type=kto)
    assert (example.prompt, example.answers, example.desirable) == ("q", (" b!",), True)


def test_every_named_type_is_described() -> None:
    assert tuple(PREFERENCE_TYPES) == PREFERENCE_NAMES


# --- bad rows

PAIR = {"prompt": "Q", **TEXTS}


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({}, {}, "the row is empty"),
        ({"prompt": "Q", "chosen": "A"}, {}, "`rejected` is missing; the row has the fields: prompt, chosen"),
        ({**PAIR, "chosen": None}, {}, "`chosen` is null"),
        ({**PAIR, "chosen": 1.5}, {}, "`chosen` must be text, and is a number with a fraction"),
        ({**PAIR, "prompt": " "}, {}, "the row asks nothing: `prompt` is empty"),
        ({**PAIR, "prompt": []}, {}, "`prompt` has no message"),
        ({**PAIR, "chosen": []}, {}, "`chosen` has no message"),
        ({**PAIR, "prompt": ASK, "rejected": 3.5}, {}, "`rejected` must be text"),
        ({**PAIR, "prompt": ASK + said("x")}, {}, "`prompt` ends with an answer"),
        ({**PAIR, "chosen": ["x"]}, {}, "message 1 of `chosen` must be an object, and is text"),
        ({**PAIR, "chosen": [{"role": "me", "content": "x"}]}, {}, "message 1 of `chosen` has the role 'me'"),
        ({**PAIR, "chosen": WHOLE["chosen"]}, {}, "`chosen` is a conversation that does not go on from the prompt"),
        ({"chosen": "yes", "rejected": "no"}, {}, "no common beginning"),
        ({"chosen": said("a"), "rejected": said("b")}, {}, "no turn in common"),
        ({"chosen": WHOLE["chosen"], "rejected": "b"}, {}, "`rejected` must be a list of messages, and is text"),
        ({"messages": ASK, **TEXTS}, {"type": "chat_template.argilla_chat"}, "`chosen` must be a list of messages"),
        (PAIR, {"type": "chat_template.default"}, "`messages` or `conversations` is missing"),
        (PAIR, {"type": "chatml.intel"}, "`question` is missing"),
        ({"input": "Q", "chosen": "A"}, {"type": "chatml.argilla"}, "`rejected` or `rejected_response` is missing"),
        ({"prompt": "Q", "answers": [{"answer": "A", "rank": 1}]}, {"type": "zephyr.nectar"}, "at least two"),
        ({"prompt": "Q", "answers": [{"answer": "A"}] * 2}, {"type": "zephyr.nectar"}, "must have `answer` and `rank`"),
        ({"prompt": "Q", "answers": [{"answer": "A", "rank": 1}] * 2}, {"type": "zephyr.nectar"}, "the same rank"),
        (
            {"prompt": [{"role": "system", "content": "a"}, *ASK], **TEXTS, "system": "b"},
            {},
            "two different system texts",
        ),
        (
            {"prompt": "Add 1 and 2.", "chosen": ASK + said("a") + ASK + said("b"), "rejected": BAD},
            {"type": "chatml.ultra"},
            "are one turn of text",
        ),
    ],
)
def test_bad_pairs(row: Row, keys: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples(row, **keys)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "completion": "A"}, "`label` is missing"),
        ({"prompt": "Q", "completion": "A", "label": "yes"}, r"`label` must be true or false \(desirable or not\)"),
        ({"prompt": "Q", "completion": "A", "label": -1}, "`label` must be true or false"),
        ({"prompt": "Q", "label": True}, "`completion` is missing"),
        ({"completion": "A", "label": True}, "`prompt` is missing"),
        ({"completion": ASK, "label": True}, "must end with an answer"),
    ],
)
def test_bad_answers(row: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples(row, "kto")


def test_the_place_of_a_bad_row_is_said_and_it_can_be_left_out(prepared: Prepare) -> None:
    rows = [PAIR, {"prompt": "Q"}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: `chosen` is missing"):
        prepared(rows)
    data = prepared(rows, skip_bad_rows=True)
    assert len(data.train) == 1
    assert data.report.dropped["bad row"].count == 1


# --- counted and said


def test_nothing_to_compare_is_left_out_and_said(prepared: Prepare) -> None:
    rows: list[Row] = [
        PAIR,
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"prompt": "Q", "chosen": "same", "rejected": "same<|endoftext|>"},
        {"chosen": WHOLE["chosen"], "rejected": WHOLE["chosen"]},
        {"chosen": "a b", "rejected": "a b"},
    ]
    data = prepared(rows)
    assert len(data.train) == 1
    counts = {reason: tally.count for reason, tally in data.report.dropped.items()}
    assert sorted(counts.values()) == [1, 3]
    assert any("same tokens" in reason for reason in counts)
    with pytest.raises(LeftOut):
        examples(rows[1], "kto")


def test_empty_answers_numbers_and_special_text_are_counted(prepared: Prepare) -> None:
    rows = [
        {"prompt": "Q", "chosen": "", "rejected": "x"},
        {"prompt": ASK, "chosen": said(" "), "rejected": said("x")},
        {"prompt": "Q", "chosen": 3, "rejected": "x<|im_end|>y"},
    ]
    notes = prepared(rows).report.sources[0].notes
    found = {note.split(",")[0]: tally.count for note, tally in notes.items()}
    assert found == {
        "empty answers": 2,
        "whole numbers where text belongs": 1,
        "rows with text that reads like a special token and becomes it": 1,
    }


def test_what_a_format_writes_itself_is_no_special_text(prepared: Prepare) -> None:
    notes = prepared([PAIR], keys={"type": "chatml.prompt_pairs"}).report.sources[0].notes
    assert not notes
    notes = prepared([{**PAIR, "prompt": "<|pad|>"}], keys={"type": "chatml.prompt_pairs"}).report.sources[0].notes
    assert len(notes) == 1


def test_the_report_says_pairs_prompts_and_labels(prepared: Prepare) -> None:
    data = prepared([PAIR, {**PAIR, "prompt": "R", "extra": 1}, PAIR], val_set_size=1)
    lines = "\n".join(data.report.lines())
    assert "3 rows, 3 pairs" in lines
    assert "2 pairs to train on, 1 for validation" in lines
    assert "columns that are not read: extra" in lines
    tokens, prompts = int(data.train.lengths.sum()), int(data.train.prompts.sum())
    assert f"{prompts:,} tokens of prompts stand before both answers of a pair: as many of {tokens:,}" in lines
    parts = [length for at in range(2) for length in data.train[at].lengths or ()]
    assert sum(count for *_, count in data.report.histogram) == 4
    assert data.report.histogram[-1][1] == max(parts)
    assert data.report.longest == max(*parts, *(data.validation[0].lengths or ()))  # type: ignore[index]


def test_the_balance_of_labels_is_said() -> None:
    level, text = Balance(300, 250, 1.0, 1.0).line()
    assert (level, "1.20:1" in text) == (20, True)
    level, text = Balance(300, 100, 1.0, 1.0).line()
    assert level == 30
    assert "kto_undesirable_weight between 2.25 and 3" in text
    assert Balance(300, 100, 1.0, 2.5).line()[0] == 20
    assert Balance(131, 134, 1.0, 1.0).line()[0] == 20
    level, text = Balance(100, 300, 1.0, 1.0).line()
    assert "kto_desirable_weight between 3 and 4" in text
    assert "needs both labels" in Balance(5, 0, 1.0, 1.0).line()[1]


def test_a_pairs_two_answers_stay_on_one_side_of_the_split(prepared: Prepare) -> None:
    rows = [{"prompt": f"Q {at}", **TEXTS} for at in range(10)]
    data = prepared(rows, "kto", val_set_size=3)
    assert data.validation is not None
    assert len(data.validation) == 6
    assert len(set(data.validation.rows)) == 3
    assert not set(data.validation.rows) & set(data.train.rows)
    assert data.report.balance is not None
    assert (data.report.balance.desirable, data.report.balance.undesirable) == (7, 7)


def test_repeats_are_of_prompt_answers_and_label(prepared: Prepare) -> None:
    swapped = {"prompt": "Q", "chosen": BAD, "rejected": GOOD}
    assert prepared([PAIR, swapped, PAIR]).report.duplicates == 1
    answer = {"prompt": "Q", "completion": "A", "label": True}
    assert prepared([answer, {**answer, "label": False}, answer], "kto").report.duplicates == 1


def test_options_that_change_tokens_make_another_cache(prepared: Prepare) -> None:
    def print_of(rl: str, **flat: Any) -> str:
        return prepared([PAIR], rl, **flat).fingerprint

    dpo = print_of("dpo")
    assert dpo == print_of("simpo") == print_of("dpo", rl_beta=0.3)
    assert len({dpo, print_of("kto"), print_of("orpo"), print_of("dpo", max_prompt_len=9)}) == 4
    assert prepared([PAIR], "dpo").report.cache_hit


def test_processes_make_the_same(prepared: Prepare, tmp_path: Path) -> None:
    alone, two = (
        prepared(chats(), dataset_processes=count, dataset_prepared_path=str(tmp_path / str(count)))
        for count in (1, 2)
    )
    assert not two.report.cache_hit
    assert [sides(two, at) for at in range(3)] == [sides(alone, at) for at in range(3)]
    assert two.train.digests.tolist() == alone.train.digests.tolist()


def test_a_prompt_that_the_template_changes_is_shared_as_far_as_it_goes(prepared: Prepare, tokenizer_with: Any) -> None:
    # It tells in front how many messages follow, so the two prompts part at once.
    template = (
        "{{ 'n' * messages | length }}|{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"prompt": ASK, "chosen": said("3"), "rejected": [*said("4"), *ASK, *said("5")]}
    data = prepared([row], tokenizer=tokenizer_with(template))
    (chosen, labels), (rejected, _) = sides(data)
    prompt = int(data.train.prompts[0])
    assert chosen[:prompt] == rejected[:prompt]
    assert prompt < labels.index(next(label for label in labels if label != -100))
    assert any("prompt comes out otherwise" in note for note in data.report.sources[0].notes)


# --- lengths


def test_over_long_rows(prepared: Prepare, with_bos: Any) -> None:
    rows = [
        {"prompt": "x y", "chosen": " a", "rejected": " b"},
        {"prompt": "1 2 3 4 5 6 7 8 9", "chosen": " a", "rejected": " b"},
        {"prompt": "x y", "chosen": " a", "rejected": " b c d e f g h i j k"},
    ]
    full = prepared(rows, tokenizer=with_bos)
    limits: Row = {"tokenizer": with_bos, "sequence_len": 10, "max_prompt_len": 5}
    data = prepared(rows, **limits)
    assert len(data.train) == 1
    counts = {reason: tally.count for reason, tally in data.report.dropped.items()}
    assert counts == {"prompt longer than max_prompt_len": 1, "longer than sequence_len": 1}
    with pytest.raises(DataError, match=r"rows.jsonl:2: .* tokens in the prompt \(prompt longer than max_prompt_len"):
        prepared(rows, excess_length_strategy="raise", **limits)
    cut = prepared(rows, excess_length_strategy="truncate", **limits)
    assert len(cut.train) == 3
    assert sides(cut, 0) == sides(full, 0)
    for (short, labels), (whole, _) in zip(sides(cut, 1), sides(full, 1), strict=True):
        answer = whole[full.train.prompts[1] :]
        prompt = whole[: full.train.prompts[1]]
        assert short == [prompt[0], *prompt[-4:], *answer]
        assert labels == [-100] * 5 + answer
    assert cut.train.prompts[1] == 5
    (chosen, _), (rejected, _) = sides(cut, 2)
    (whole, _), (longer, _) = sides(full, 2)
    assert (chosen, rejected) == (whole, longer[:10])
    assert {note: tally.count for note, tally in cut.report.sources[0].notes.items()} == {
        "prompts truncated to max_prompt_len": 1,
        "rows truncated to sequence_len": 1,
    }


@pytest.mark.parametrize(
    ("prompt", "answers", "limit", "most", "kept", "left"),
    [
        (6, (2, 3), 20, None, 6, [8, 9]),
        (20, (2, 3), 10, None, 7, [9, 10]),  # the prompt gives way
        (20, (2, 30), 10, None, 5, [7, 10]),  # down to half, then the answer
        (20, (2, 30), 10, 4, 4, [6, 10]),
        (20, (2, 3), 10, 30, 7, [9, 10]),
        (3, (20, 9), 10, None, 3, [10, 10]),
    ],
)
def test_what_is_cut_off(
    prompt: int, answers: tuple[int, int], limit: int, most: int, kept: int, left: list[int]
) -> None:
    lengths = [prompt + answer for answer in answers]
    ids = np.concatenate([np.r_[:prompt, 1000 * side + np.arange(n)] for side, n in ((1, answers[0]), (2, answers[1]))])
    cut, labels, new, new_prompt = cut_answers(
        ids.astype(np.int32), -ids.astype(np.int32), lengths, prompt, 1, limit, most
    )
    assert (new_prompt, new) == (kept, left)
    assert (labels == -cut).all()
    for side, part in enumerate(np.split(cut, [new[0]]), start=1):
        assert part[0] == 0  # BOS
        assert part[1:kept].tolist() == list(range(prompt - kept + 1, prompt))
        assert part[kept:].tolist() == [1000 * side + at for at in range(len(part) - kept)]


# --- prompts, preview


def test_samples_are_asked_with_the_prompt(prepared: Prepare, toy_tokenizer: Any) -> None:
    data = prepared([{"prompt": ASK, "chosen": said(GOOD), "rejected": said(BAD)}], "orpo")
    (sample,) = validation_prompts(data.train, toy_tokenizer, 1)
    assert list(sample.prompt_ids) == data.train[0].input_ids[: data.train.prompts[0]].tolist()
    assert sample.label.endswith("assistant\n")
    assert (sample.expected or "").startswith(GOOD)
    rows = [{"prompt": "Q", "completion": "A", "label": label} for label in (True, False)]
    good, bad = validation_prompts(prepared(rows, "kto").train, toy_tokenizer, 2)
    assert (good.label, good.expected is not None, bad.expected) == ("Q", True, None)


@pytest.mark.parametrize(
    ("keys", "row"),
    [
        ({"type": "chat_template.default"}, {"messages": ASK, **TEXTS}),
        ({"type": "chatml.intel"}, {"question": "Add 1 and 2.", **TEXTS}),
        ({"type": {"prompt_format": "Q: {prompt}\nA:"}}, {"prompt": "Add 1 and 2.", **TEXTS}),
        ({}, {"prompt": "Add 1 and 2.", **TEXTS}),
        ({}, {"prompt": ASK, **TEXTS}),
    ],
)
def test_a_prompt_by_itself_is_that_of_the_rows(
    prepared: Prepare, toy_tokenizer: Any, tmp_path: Path, keys: Row, row: Row
) -> None:
    data = prepared([row], "dpo", keys)
    path = str(tmp_path / "rows.jsonl")
    config = Config.from_flat({"base_model": "toy", "datasets": [{"path": path, **keys}], "rl": "dpo"})
    one = config.data.datasets[0]
    renderer = Renderer(toy_tokenizer, config)
    wanted = data.train[0].input_ids[: data.train.prompts[0]].tolist()
    assert renderer.prompt_ids(prompt_example(one, "Add 1 and 2.", rl="dpo"), one) == wanted
    (example,) = preference_examples(row, one, "dpo", Counter())
    assert renderer.prompt_ids(example, one) == wanted


def test_preview_shows_both_answers_below_the_prompt(prepared: Prepare, toy_tokenizer: Any) -> None:
    pair = prepared([{"prompt": "Q:", "chosen": " a", "rejected": " b"}])
    shown = answers_text(pair.train[0], toy_tokenizer, plain=True).plain
    assert shown == "Q:\n--- chosen\n⟦ a<|endoftext|>⟧\n--- rejected\n⟦ b<|endoftext|>⟧"
    orpo = prepared([{"prompt": "Q:", "chosen": " a", "rejected": " b"}], "orpo")
    shown = answers_text(orpo.train[0], toy_tokenizer, plain=True).plain
    assert shown == "Q⟦:⟧\n--- chosen\n⟦ a<|endoftext|>⟧\n--- rejected\n⟦ b<|endoftext|>⟧"
    rows = [{"prompt": "Q:", "completion": " a", "label": label} for label in (True, False)]
    answers = prepared(rows, "kto").train
    assert answers_text(answers[0], toy_tokenizer, plain=True).plain == "Q:\n--- desirable\n⟦ a<|endoftext|>⟧"
    assert "--- undesirable\n" in answers_text(answers[1], toy_tokenizer, plain=True).plain


# --- real data, whole


@pytest.mark.parametrize(
    ("name", "rl", "keys", "kept"),
    [
        ("prefs_dpo_en_300_conversational.jsonl", "dpo", {}, 300),
        ("prefs_dpo_en_single_turn.jsonl", "simpo", {"type": "chatml.prompt_pairs"}, 194),
        ("llamafactory/kto_en_demo.json", "kto", {"type": "chat_template.default"}, 300),
    ],
)
def test_real_data(prepared: Prepare, toy_tokenizer: Any, name: str, rl: str, keys: Row, kept: int) -> None:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the checkout")
    data = prepared(path, rl, keys, sequence_len=16384)
    assert len(data.train) == kept
    assert not data.report.dropped
    for at in range(kept):
        prompt = int(data.train.prompts[at])
        parts = sides(data, at)
        assert len({tuple(ids[:prompt]) for ids, _ in parts}) == 1
        for ids, labels in parts:
            assert labels[:prompt] == [-100] * prompt
            assert labels[prompt:] == ids[prompt:]
