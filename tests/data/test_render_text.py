"""Plain text to tokens: where documents begin and end, and what of them is trained."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from luthier.config import Config
from luthier.data.encode import TextEncoder
from luthier.data.examples import Segment, TextExample, TokenExample
from luthier.data.masks import SPECIAL_TEXT
from luthier.data.render import UNTRAINED, Renderer


def example(*texts: str, **options: Any) -> TextExample:
    """Segments of which every second one is trained."""
    return TextExample(tuple(Segment(text, number % 2 == 1) for number, text in enumerate(texts)), **options)


@pytest.fixture
def config() -> Config:
    return Config.from_flat({"base_model": "toy", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}]})


@pytest.fixture
def render(config):
    def one(tokenizer: Any, *examples: Any) -> list[Any]:
        return Renderer(tokenizer, config).render(examples, config.data.datasets[0])

    return one


@pytest.fixture(
    scope="session", params=["prepend", "metaspace-first", "metaspace-always", "byte-level-prefix"]
)
def prefixing(request) -> Any:
    """Tokenizers that put a space before every text: Llama 2's normalizer, its newer form, RoBERTa's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁a", "▁The", "an", "a", "The", "s", "er", "w", "\n"]
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzTAQI:#.0123456789"})
    vocabulary = {
        token: number
        for number, token in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *words, *letters]))
    }
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [("a", "n"), ("e", "r"), ("▁", "a")]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if request.param == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif request.param == "byte-level-prefix":
        core = Tokenizer(models.BPE({c: n for n, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
        core.add_special_tokens(["<s>", "</s>"])
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        scheme = request.param.removeprefix("metaspace-")
        core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    if request.param == "byte-level-prefix":
        core.decoder = decoders.ByteLevel()
    else:
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def test_a_later_segment_gets_no_space(prefixing, render):
    """The answer follows the prompt's last character, and the prompt's ids are those of the prompt alone."""
    assert TextEncoder(prefixing).adds_prefix
    for answer in ("Than", "answer", "a\nb", "\nnew", " spaced", "42"):
        rendered = render(prefixing, example("The ask:\n", answer))[0]
        prompt = prefixing("The ask:\n")["input_ids"]
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.labels == [UNTRAINED] * len(prompt) + rendered.input_ids[len(prompt) :]
        text = prefixing.decode(rendered.input_ids, skip_special_tokens=True)
        assert text.lstrip(" ") == "The ask:\n" + answer
        joint = prefixing("The ask:\n" + answer)["input_ids"]
        if joint[: len(prompt)] == prompt:
            assert rendered.input_ids == [*joint, prefixing.eos_token_id]


def test_without_prefix_segments_are_encoded_apart(toy_tokenizer, render):
    assert not TextEncoder(toy_tokenizer).adds_prefix
    rendered = render(toy_tokenizer, example("The ", "answer"))[0]
    first, second = (toy_tokenizer(text)["input_ids"] for text in ("The ", "answer"))
    eos = toy_tokenizer.eos_token_id
    assert rendered.input_ids == [*first, *second, eos]
    assert rendered.labels == [UNTRAINED] * len(first) + [*second, eos]


def test_bos_only_where_the_tokenizer_puts_one(prefixing, toy_tokenizer, tokenizer_with, render):
    assert TextEncoder(prefixing).opening == [prefixing.bos_token_id]
    assert TextEncoder(toy_tokenizer).opening == []
    assert TextEncoder(tokenizer_with()).opening == []  # it has a BOS, and does not put it
    rendered = render(prefixing, example("Q", "A"), example("Q", "A", add_bos=False), example("<s>Q", "A"))
    assert [one.input_ids.count(prefixing.bos_token_id) for one in rendered] == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "ends", "trained"),
    [
        (example("Q", "A"), 1, True),
        (example("Q", ""), 1, True),
        (example("Q", "A", add_eos=False), 0, None),
        (example("Q", "A", "Q"), 1, False),
        (example("Q", "A<|endoftext|>"), 1, True),
        (TextExample(()), 1, False),
    ],
)
def test_eos_ends_a_document_and_is_trained_with_its_answer(toy_tokenizer, render, text, ends, trained):
    rendered = render(toy_tokenizer, text)[0]
    assert rendered.input_ids.count(toy_tokenizer.eos_token_id) == ends
    if ends:
        assert rendered.input_ids[-1] == toy_tokenizer.eos_token_id
        assert (rendered.labels[-1] == toy_tokenizer.eos_token_id) == trained


def test_equals_trls_prompt_and_completion(toy_tokenizer, render):
    """TRL tokenises prompt and prompt + completion + EOS; where no token crosses the border the masks are the same."""
    rows = [
        ("### Instruction:\nSay it.\n\n### Response:\n", "It is said."),
        ("1, 1, 2, 3,", " 5, 8"),
        ("é ", "日本🚀"),
    ]
    for prompt, answer in rows:
        rendered = render(toy_tokenizer, example(prompt, answer))[0]
        before = toy_tokenizer(prompt)["input_ids"]
        whole = toy_tokenizer(prompt + answer + toy_tokenizer.eos_token)["input_ids"]
        assert whole[: len(before)] == before
        assert rendered.input_ids == whole
        mask = [0] * len(before) + [1] * (len(whole) - len(before))  # trl: SFTTrainer, `completion_mask`
        assert [int(label != UNTRAINED) for label in rendered.labels] == mask


def test_text_like_a_special_token_is_noted(toy_tokenizer, render):
    rendered = render(toy_tokenizer, example("Q", "A"), example("What is <|im_end|>?", "An end"))
    assert rendered[0].notes == ()
    assert rendered[1].notes == ((SPECIAL_TEXT, "<|im_end|>"),)


def test_real_row_with_a_special_token(shared_data, prefixing, render):
    text = (shared_data / "llamafactory" / "kto_en_demo.json").read_text(encoding="utf-8")
    at = text.index("</s>")
    rendered = render(prefixing, example(text[at - 20 : at + 24], "A"))[0]
    assert rendered.notes == ((SPECIAL_TEXT, "</s>"),)


def test_slow_tokenizers(config):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(chat_template=(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ))  # fmt: skip
    assert not tokenizer.is_fast
    config = Config.from_flat(
        {"base_model": "toy", "datasets": [{"path": "rows.jsonl", "type": "chat_template"}]}
    )
    renderer, entry = Renderer(tokenizer, config), config.data.datasets[0]
    renderer.check(entry)
    rendered = renderer.render([example("Qé", "Aé")], entry)[0]
    assert tokenizer.decode([label for label in rendered.labels if label != UNTRAINED]) == "Aé</s>"
    from luthier.data.examples import ChatExample

    chat = ChatExample([{"role": "user", "content": "Qé"}, {"role": "assistant", "content": "Aé"}])
    rendered = renderer.render([chat], entry)[0]
    assert tokenizer.decode([label for label in rendered.labels if label != UNTRAINED]) == "Aé</s>"


def test_prompt_ids_are_the_beginning_of_what_was_trained(toy_tokenizer, prefixing, config):
    entry = config.data.datasets[0]
    for tokenizer in (toy_tokenizer, prefixing):
        renderer = Renderer(tokenizer, config)
        full = renderer.render([example("The ask:\n", "answer")], entry)[0]
        prompt = renderer.prompt_ids(example("The ask:\n", "answer"), entry)
        assert prompt == renderer.prompt_ids(example("The ask:\n", add_eos=False), entry)
        assert full.input_ids[: len(prompt)] == prompt
        assert full.labels[: len(prompt) + 1] == [UNTRAINED] * len(prompt) + full.input_ids[len(prompt) :][:1]


def test_tokens_made_elsewhere_are_passed_on(toy_tokenizer, config, render):
    made = TokenExample([5, 6, 7, 8], [-100, 6, -100, 8], (2, 2))
    rendered = render(toy_tokenizer, made)[0]
    assert (rendered.input_ids, rendered.labels, rendered.lengths) == (
        [5, 6, 7, 8],
        [-100, 6, -100, 8],
        (2, 2),
    )
    assert Renderer(toy_tokenizer, config).prompt_ids(made, config.data.datasets[0]) == [5]


def test_kinds_may_be_mixed_and_keep_their_order(toy_tokenizer, config):
    renderer, entry = Renderer(toy_tokenizer, config), config.data.datasets[0]
    examples = [example("Q", "A"), TokenExample([5, 6], [-100, 6], (2,)), example("R", "B")]
    alone = [renderer.render([one], entry)[0] for one in examples]
    assert renderer.render(examples, entry) == alone
    assert pickle.loads(pickle.dumps(renderer)).render(examples, entry) == alone


def test_truncation_and_padding_of_a_tokenizer_file_are_not_applied(toy_tokenizer, tokenizer_with, render):
    tokenizer = tokenizer_with()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    rendered = render(tokenizer, example("The quick brown fox", "jumps"))[0]
    assert (
        rendered.input_ids[:-1]
        == render(toy_tokenizer, example("The quick brown fox", "jumps"))[0].input_ids[:-1]
    )


def test_offsets_of_whitespace_are_not_trimmed(toy_tokenizer):
    """Llama 3's post-processor moves the offsets of tokens that begin or end in spaces; masks need the true ones."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(toy_tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    text = "ab \n c🚀\n"
    for encoder in (TextEncoder(tokenizer), TextEncoder(toy_tokenizer)):
        encoded = encoder.with_offsets([text])[0]
        for cut in range(1, len(text)):
            first, middle = encoded.tokens(0, cut)
            start, last = encoded.tokens(cut, len(text))
            assert first == 0
            assert last == len(encoded.ids)
            assert start <= middle  # a token across the cut is in both parts, no token is in neither
            assert tokenizer.decode(encoded.ids[:middle]).startswith(text[:cut])
            assert tokenizer.decode(encoded.ids[start:]).endswith(text[cut:])
