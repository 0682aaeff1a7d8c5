"""The engine against `model.generate` on every prompt alone, and what it promises besides."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from luthier.errors import ConfigError, DataError
from luthier.generate.engine import Completion, Engine
from luthier.generate.sampling import Sampling

LENGTHS = (3, 5, 5, 9, 20, 40, 40, 41, 90)


class Parrot(torch.nn.Module):
    """A model that says the given ids one after another, whatever it is asked."""

    def __init__(self, model: Any, ids: list[int]):
        super().__init__()
        self.llama = model
        self.ids = ids
        self.said = 0
        self.config, self.generation_config = self.llama.config, self.llama.generation_config
        self.get_input_embeddings = self.llama.get_input_embeddings
        self._get_logits_processor = self.llama._get_logits_processor

    def forward(self, **inputs: Any) -> Any:
        output = self.llama(**inputs)
        output.logits[:, -1] = 0
        output.logits[:, -1, self.ids[self.said]] = 1
        self.said += 1
        return output


@pytest.fixture(scope="module")
def parrot(toy_model: Any) -> Callable[[list[int]], Parrot]:
    model = toy_model("llama", max_position_embeddings=512)
    return lambda ids: Parrot(model, ids)


def some_prompts(seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 260) for _ in range(length)] for length in lengths]


def alone(model: Any, prompt: list[int], new_tokens: int, eos: list[int], **more: Any) -> list[int]:
    """What transformers answers to one prompt, greedily."""
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0, use_cache=True, **more
    )
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def ids_of_some(model: Any, prompts: list[list[int]]) -> list[int]:
    """Two ids that end about half of the answers early, and not all."""
    answers = [set(alone(model, prompt, 24, [2])) for prompt in prompts]
    counts = {token: sum(token in answer for answer in answers) for token in set().union(*answers)}
    first = min(counts, key=lambda token: (abs(counts[token] - len(prompts) // 2), token))
    rest = [answer for answer in answers if first not in answer]
    return [first, min(token for token in rest[0] if not all(token in answer for answer in rest))]


def test_greedy_equals_generate_alone(any_family: Any, byte_tokenizer: Any) -> None:
    model, prompts = any_family, some_prompts()
    terminators = ids_of_some(model, prompts)
    completions = Engine(model, byte_tokenizer, terminators).generate(prompts, Sampling(max_new_tokens=24))
    expected = [alone(model, prompt, 24, terminators) for prompt in prompts]
    assert [completion.token_ids for completion in completions] == expected
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion, ids in zip(completions, expected, strict=True):
        assert (completion.finish_reason == "stop") == (ids[-1] in terminators)


def test_penalties_of_the_model_count_prompt_tokens_only_once(toy_model: Any, byte_tokenizer: Any) -> None:
    """A repetition penalty reads the ids before, and they are the row's own."""
    model = toy_model("llama")
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.no_repeat_ngram_size = 2
    prompts = some_prompts(seed=2)
    completions = Engine(model, byte_tokenizer, [2]).generate(prompts, Sampling(max_new_tokens=16))
    expected = [alone(model, prompt, 16, [2]) for prompt in prompts]
    assert [completion.token_ids for completion in completions] == expected
    plain = Engine(toy_model("llama"), byte_tokenizer, [2]).generate(prompts, Sampling(max_new_tokens=16))
    assert [completion.token_ids for completion in plain] != expected


def test_stop_strings_end_a_text_and_are_not_in_it(llama: Any, byte_tokenizer: Any) -> None:
    prompts = some_prompts(seed=3, lengths=(4, 6, 9))
    engine = Engine(llama, byte_tokenizer, [2])
    free = engine.generate(prompts, Sampling(max_new_tokens=30))
    stop = free[1].text[5:8]
    stopped = engine.generate(prompts, Sampling(max_new_tokens=30, stop=(stop, "never there")))
    assert stopped[1].text == free[1].text[: free[1].text.index(stop)]
    assert stopped[1].finish_reason == "stop"
    assert len(stopped[1].token_ids) < 30
    assert free[1].token_ids[: len(stopped[1].token_ids)] == stopped[1].token_ids


@pytest.mark.parametrize("prompt_text", ["naïve 🎻 ", "plain "])
def test_stream_gives_whole_characters_and_the_same_text(
    parrot: Any, byte_tokenizer: Any, prompt_text: str
) -> None:
    text = "a 🎻, 漢字 and é: " * 3
    model = parrot(byte_tokenizer(text)["input_ids"] + [2])
    engine = Engine(model, byte_tokenizer, [2])
    deltas = engine.stream(byte_tokenizer(prompt_text)["input_ids"], Sampling(max_new_tokens=200))
    pieces = list(deltas)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece and piece for piece in pieces)
    assert len(pieces) == len(text)  # one token is one byte: every character comes as soon as it is whole
    assert deltas.completion is not None
    assert deltas.completion.text == text
    assert deltas.completion.finish_reason == "stop"
    assert deltas.completion.token_ids[-1] == 2


def test_stream_holds_back_what_may_become_a_stop_string(parrot: Any, byte_tokenizer: Any) -> None:
    model = parrot(byte_tokenizer("one\nUs or two\nUser: three")["input_ids"])
    deltas = Engine(model, byte_tokenizer, [2]).stream([5], Sampling(max_new_tokens=100, stop=("\nUser:",)))
    assert "".join(deltas) == "one\nUs or two"
    assert deltas.completion is not None
    assert deltas.completion.text == "one\nUs or two"


def test_stream_shows_a_text_cut_in_the_middle_of_a_character(parrot: Any, byte_tokenizer: Any) -> None:
    model = parrot(byte_tokenizer("ab🎻")["input_ids"])
    deltas = Engine(model, byte_tokenizer, [2]).stream([5], Sampling(max_new_tokens=4))
    assert "".join(deltas) == deltas.completion.text == "ab\ufffd"  # type: ignore[union-attr]
    assert deltas.completion.finish_reason == "length"  # type: ignore[union-attr]


def test_a_sampled_text_depends_on_seed_and_prompt_only(llama: Any, byte_tokenizer: Any) -> None:
    prompts = some_prompts(seed=4)
    engine = Engine(llama, byte_tokenizer, [2])
    sampling = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=7)
    state = torch.get_rng_state()
    together = engine.generate(prompts, sampling)
    assert torch.equal(state, torch.get_rng_state())  # a training run finds its random numbers untouched
    one_by_one = [engine.generate([prompt], sampling)[0] for prompt in reversed(prompts)][::-1]
    streamed = engine.stream(prompts[3], sampling)
    list(streamed)
    assert together == one_by_one
    assert streamed.completion == together[3]
    assert engine.generate(prompts, Sampling(max_new_tokens=12, temperature=0.8, seed=8)) != together
    twice = engine.generate([prompts[0], prompts[0]], sampling)
    assert twice[0] == together[0]
    assert twice[0].token_ids != twice[1].token_ids


def test_sampling_draws_what_the_probabilities_say(llama: Any, byte_tokenizer: Any) -> None:
    prompt = some_prompts(lengths=(6,))[0]
    with torch.no_grad():
        logits = llama(torch.tensor([prompt])).logits[0, -1].float() / 3
    best = logits.topk(5)
    expected = best.values.softmax(-1)
    sampling = Sampling(max_new_tokens=1, temperature=3.0, top_k=5, top_p=1.0, seed=1)
    drawn = Engine(llama, byte_tokenizer, []).generate([prompt] * 3000, sampling)
    counts = torch.tensor([sum(c.token_ids == [token] for c in drawn) for token in best.indices.tolist()])
    assert counts.sum() == 3000  # nothing beyond the top five
    assert torch.allclose(counts / 3000, expected, atol=0.03)


def test_the_models_own_defaults_are_read(toy_model: Any, byte_tokenizer: Any) -> None:
    model = toy_model("llama")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_p=0.7, max_new_tokens=9, eos_token_id=[2, 3]
    )
    engine = Engine(model, byte_tokenizer)
    assert engine.described(Sampling()) == {"max_new_tokens": 9, "temperature": 0.3, "top_p": 0.7}
    assert engine.described(Sampling(temperature=0))["temperature"] == 0.0
    assert engine.terminators == {2, 3}
    assert engine.generate(some_prompts(lengths=(5,)), Sampling(seed=1))[0].token_ids != []
    bare = Engine(toy_model("llama"), byte_tokenizer)
    assert bare.described(Sampling(top_p=0.5)) == {"max_new_tokens": 128, "temperature": 1.0, "top_p": 0.5}


def test_the_model_is_as_it_was(toy_model: Any, byte_tokenizer: Any) -> None:
    model = toy_model("gpt2")  # has dropout
    model.train()
    model.transformer.h[0].eval()
    model.config.use_cache = False
    flags = [module.training for module in model.modules()]
    engine = Engine(model, byte_tokenizer, [2])
    prompts = some_prompts(lengths=(5, 8))
    sampling = Sampling(max_new_tokens=8)
    assert engine.generate(prompts, sampling) == engine.generate(prompts, sampling)  # no dropout
    stream = engine.stream(prompts[0], sampling)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert [module.training for module in model.modules()] == flags
    assert model.config.use_cache is False
    assert model(torch.tensor([[5, 6]])).logits.requires_grad


def test_progress_and_empty_lists(llama: Any, byte_tokenizer: Any) -> None:
    engine = Engine(llama, byte_tokenizer, [2])
    assert engine.generate([]) == []
    seen: dict[int, Completion] = {}
    completions = engine.generate(some_prompts(), Sampling(max_new_tokens=3), on_done=seen.__setitem__)
    assert [seen[index] for index in range(len(LENGTHS))] == completions


def test_what_a_user_can_mend_is_said(llama: Any, byte_tokenizer: Any) -> None:
    engine = Engine(llama, byte_tokenizer, [2])
    with pytest.raises(DataError, match="prompt 2 of 2 is empty"):
        engine.generate([[5], []])
    with pytest.raises(DataError, match="the prompt has 128 tokens and the model's context window 128"):
        engine.stream([5] * 128)
    cut = engine.generate([[5] * 120], Sampling(max_new_tokens=50, stop=()))[0]
    assert len(cut.token_ids) <= 8
    with pytest.raises(ConfigError, match=r"top_p must be above 0.*top_k must be 0"):
        Sampling(top_p=1.5, top_k=-1)
