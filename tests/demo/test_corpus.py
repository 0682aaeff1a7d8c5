"""The pre-training text: seeded, any part of it on its own, and true to its tables."""

from __future__ import annotations

from random import Random

from luthier.demo import corpus, tasks, words
from luthier.demo.corpus import documents


def test_a_document_depends_on_seed_and_number_only() -> None:
    assert documents(3, 10, 5) == documents(3, 0, 20)[10:15]
    assert documents(3, 0, 5) != documents(4, 0, 5)


def test_the_text_is_varied_and_has_no_instruction_format() -> None:
    texts = documents(1, 0, 3000)
    assert len(set(texts)) > 2400
    assert not [text for text in texts if "### Instruction" in text or "### Response" in text]


def test_every_writer_writes_finished_text() -> None:
    for writer in (*corpus.SENTENCES, *corpus.DICTIONARIES):
        for number in range(50):
            text = writer(Random(number))
            assert text == text.strip() and "{" not in text and "None" not in text


def test_dictionary_entries_are_right() -> None:
    entries = [
        entry.partition(":")
        for writer in corpus.DICTIONARIES
        for number in range(100)
        for entry in writer(Random(number)).partition("\n")[2].replace("; ", "\n").split("\n")
    ]
    tables = (words.PLURALS, words.OPPOSITES, words.YOUNG, words.KINDS)
    assert len(entries) > 500
    for word, _, other in entries:
        near = (
            {words.neighbour(word, step) for step in (1, -1)} if word in words.DAYS + words.MONTHS else set()
        )
        assert other in near or any(table.get(word) == other for table in tables), (word, other)


def test_every_opposite_and_plural_is_the_only_one() -> None:
    assert all(words.OPPOSITES[other] == word for word, other in words.OPPOSITES.items())
    assert len(set(words.PLURALS.values())) == len(words.PLURALS)


def test_questions_in_the_text_are_none_of_the_demos() -> None:
    texts = "\n".join(documents(5, 0, 4000))
    items = [item for make in tasks.TASKS.values() for item in make()]
    fixed = {instruction for item in items for instruction, given in item.questions if given}
    assert not [instruction for instruction in fixed if instruction in texts]
