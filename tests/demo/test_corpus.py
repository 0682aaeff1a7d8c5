"""The pre-training text: seeded, any part of it on its own, and true to its tables."""

from __future__ import annotations

import re
from random import Random

from luthier.demo import lessons, stories, words
from luthier.demo.corpus import documents


def test_a_document_depends_on_seed_and_number_only():
    assert documents(3, 10, 5) == documents(3, 0, 20)[10:15]
    assert documents(3, 0, 5) != documents(4, 0, 5)


def test_the_text_is_varied_and_has_no_instruction_format():
    texts = documents(1, 0, 3000)
    assert len(set(texts)) > 2700
    assert not [text for text in texts if "### Instruction" in text or "### Response" in text]


def test_every_writer_writes_finished_prose():
    for writer, _ in (*stories.WRITERS, *lessons.LESSONS):
        for number in range(50):
            text = writer(Random(number))
            assert text == text.strip(), writer.__name__
            assert "{" not in text, writer.__name__
            assert "None" not in text, writer.__name__


def test_sums_in_the_text_are_right():
    text = "\n".join(documents(2, 0, 3000))
    found = re.findall(r"(\d+) plus (\d+) is (\d+)", text) + re.findall(r"(\d+) \+ (\d+) = (\d+)", text)
    assert len(found) > 50
    assert all(int(a) + int(b) == int(c) for a, b, c in found)


def test_every_opposite_and_plural_is_the_only_one():
    assert all(words.OPPOSITES[other] == word for word, other in words.OPPOSITES.items())
    assert len(set(words.PLURALS.values())) == len(words.PLURALS)
