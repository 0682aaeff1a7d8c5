"""GGUF files: read back by transformers and by the package gguf, and every refusal."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as cuts
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from luthier.cli import main
from luthier.errors import ConfigError, ModelError
from luthier.export.gguf import llama, pre_tokenizers, quants, vocabulary, write
from luthier.export.gguf.vocabulary import read_vocabulary, template_of
from luthier.export.save import export
from tests.export.gguf_models import COMMON, MODELS, save_model, tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(name of `MODELS`, **config changes) -> its folder, made once; tests must not write into it."""
    made: dict[str, Path] = {}

    def make(name: str, **changes: Any) -> Path:
        key = f"{name}-{changes}"
        if key not in made:
            # By the name mistral transformers takes a file for a type that the package gguf does not have.
            folder = tmp_path_factory.mktemp("model") / name.replace("mistral", "mst")
            made[key] = save_model(name, folder, **changes)
        return made[key]

    return make


IS_INSTALLED = llama.is_installed


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Others than llama.cpp read the files, and a tokenizer is tried on all texts where it is the subject."""
    monkeypatch.setattr(llama, "is_installed", lambda: False)
    if "tokenizer" not in request.node.name:
        for module in (pre_tokenizers, vocabulary):
            monkeypatch.setattr(module, "sample", lambda _: list(pre_tokenizers.TEXTS))


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def failed(call: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a call says that fails as it should."""
    assert main(["export", *call]) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "internal" not in said
    return said


# --- what is in a file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_transformers_reads_the_same_model(model_dir: Callable[..., Path], tmp_path: Path, name: str) -> None:
    # Neither scaled frequencies nor the size of a head are among what transformers takes from a GGUF file; 128 it has
    # for the latter of a qwen3 by itself.
    plain = {"qwen2": {"rope_parameters": None}, "gemma3": {"rope_parameters": None}, "qwen3": {"head_dim": 128}}
    source = model_dir(name, **plain.get(name, {}))
    file = export(str(source), "gguf", quant="f32", output=str(tmp_path / "x.gguf"))
    ours, theirs = loaded(source).state_dict(), loaded(tmp_path, gguf_file=file.name).state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        # One is added to Gemma's norms, and taken away again: the last bit of a number near one.
        error = 1.2e-7 if name.startswith("gemma") and "norm" in key else 0.0
        torch.testing.assert_close(theirs[key], ours[key], rtol=0, atol=error)


def test_an_adapter_of_every_kind_is_merged(
    model_dir: Callable[..., Path], peft_adapter: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    base = model_dir("smollm")
    kinds: list[dict[str, Any]] = [
        {},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj", "up_proj"]},
    ]
    ids = torch.arange(4, 60)[None]
    for at, kind in enumerate(kinds):
        theirs, folder = peft_adapter(base, **kind)
        tokenizer("smollm").save_pretrained(folder)
        (tmp_path / str(at)).mkdir()
        file = export(str(folder), "gguf", quant="f32", output=str(tmp_path / str(at) / "x.gguf"))
        ours = loaded(file.parent, gguf_file=file.name)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=2e-5)
        # Both ends of the model were trained apart from each other in the last one.
        assert ("output.weight" in {t.name for t in gguf.GGUFReader(file).tensors}) == ("modules_to_save" in kind)


def test_added_tokens_and_half_an_adapter(
    model_dir: Callable[..., Path], peft_adapter: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    base = model_dir("smollm")
    theirs, folder = peft_adapter(base)
    words = PreTrainedTokenizerFast.from_pretrained(base)
    new = [f"<new{n}>" for n in range(8)]
    words.add_tokens(new)
    words.save_pretrained(folder)
    (tmp_path / "out").mkdir()
    file = export(f"{folder}:0.5", "gguf", quant="f32", output=str(tmp_path / "out" / "x.gguf"))
    read = fields(file)
    assert read["tokenizer.ggml.tokens"] == words.convert_ids_to_tokens(range(len(words)))
    assert read["tokenizer.ggml.token_type"][-1] == 4  # looked for in a text first
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(file).tensors}
    assert tensors["token_embd.weight"].shape[0] == len(words)
    delta = theirs.base_model.model.model.layers[1].mlp.down_proj.get_delta_weight("default")
    plain = loaded(base).model.layers[1].mlp.down_proj.weight
    np.testing.assert_allclose(tensors["blk.1.ffn_down.weight"], (plain + delta / 2).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_formats(model_dir: Callable[..., Path], tmp_path: Path, quant: str) -> None:
    source = model_dir("smollm", intermediate_size=80)
    exact = export(str(source), "gguf", quant="f32", output=str(tmp_path / "exact.gguf"))
    (tmp_path / "q").mkdir()
    file = export(str(source), "gguf", quant=quant, output=str(tmp_path / "q" / "x.gguf"))
    assert file.stat().st_size < exact.stat().st_size
    levels = {"f16": 1024, "bf16": 128, "q8_0": 127, "q5_1": 15, "q5_0": 15, "q4_1": 7, "q4_0": 7}
    kinds = {"token_embd.weight": "Q8_0" if quant.startswith("q") else quant.upper()}
    for ours, theirs in zip(gguf.GGUFReader(exact).tensors, gguf.GGUFReader(file).tensors, strict=True):
        assert ours.name == theirs.name
        value = dequantize(theirs.data, theirs.tensor_type)
        step = np.abs(ours.data).max() / levels[quant]
        assert np.abs(value - ours.data).max() <= step
        if ours.data.ndim == 1:
            kinds[ours.name] = "F32"
        elif ours.data.shape[-1] % 32:  # no whole number of blocks
            kinds[ours.name] = "F16" if quant.startswith("q") else quant.upper()
        assert theirs.tensor_type.name == kinds.get(ours.name, quant.upper())


def test_metadata(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "own"
    shutil.copytree(model_dir("llama3"), source)
    (source / "README.md").write_text("---\nlanguage: en\nlicense: llama3.2\n---\n# A model\n")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    words = tokenizer("llama3")
    read = fields(export(str(source), "gguf", quant="q8_0", output=str(tmp_path / "out" / "x.gguf")))
    assert read["general.name"] == "own" and read["general.license"] == "llama3.2"
    assert read["general.architecture"] == "llama" and read["general.file_type"] == 7
    assert read["llama.context_length"] == 1024 and read["llama.attention.head_count_kv"] == 2
    assert read["tokenizer.ggml.pre"] == "llama-bpe" and read["tokenizer.ggml.add_bos_token"] is True
    assert read["tokenizer.ggml.eos_token_id"] == 1 and read["tokenizer.ggml.eot_token_id"] == 3
    assert read["tokenizer.ggml.tokens"][: len(words)] == words.convert_ids_to_tokens(range(len(words)))
    assert read["tokenizer.ggml.token_type"][:4] == [3] * 4 and read["tokenizer.ggml.token_type"][-5:] == [5] * 5
    stops = [line for line in (tmp_path / "out" / "Modelfile").read_text().splitlines() if "stop" in line]
    assert stops == ['PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|im_end|>"']


def test_marks_of_training_leave_the_template_as_it_is() -> None:
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}\n  {%- if m.role == 'assistant' %}\n"
        "  {% generation %}\n    {{ m.content }}\n  {%- endgeneration -%}\n\n{% else %}{{ m.content }}{% endif %}\n"
        "{% endfor %}"
    )
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer("gpt2").backend_tokenizer, chat_template=template)
    messages = [{"role": r, "content": f"{r} says"} for r in ("user", "assistant", "user", "assistant")]
    stripped = template_of(words)
    assert stripped is not None and "generation" not in stripped
    assert words.apply_chat_template(messages, tokenize=False) == words.apply_chat_template(
        messages, chat_template=stripped, tokenize=False
    )


def test_of_a_model_that_sees_the_text_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, kind, settings = MODELS["gemma3"]
    words = tokenizer(kind)
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {**COMMON, **settings, "vocab_size": len(words) + 5, "tie_word_embeddings": True}
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "sees")
    words.save_pretrained(tmp_path / "sees")
    file = export(str(tmp_path / "sees"), "gguf", quant="f32", output=str(tmp_path / "x.gguf"))
    tensors = {t.name: t.data for t in gguf.GGUFReader(file).tensors}
    assert len(tensors) == 6 * 13 + 2 and "of what sees pictures are left out" in caplog.text
    expected = model.model.language_model.layers[5].self_attn.o_proj.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.5.attn_output.weight"], expected)


def test_one_tensor_at_a_time(
    model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    alive: list[weakref.ref[Any]] = []
    most = 0
    right = quants.quantised

    def watched(value: Any, kind: str, name: str) -> Any:
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(one() is not None for one in alive))
        return right(value, kind, name)

    monkeypatch.setattr(write.quants, "quantised", watched)
    export(str(model_dir("smollm")), "gguf", quant="f16", output=str(tmp_path / "x.gguf"))
    assert len(alive) == 20 and most == 1


# --- tokenizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pre"),
    [("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("qwen2", "qwen2"), ("smollm", "smollm"), ("gemma", "default")],
)
def test_pre_tokenizer_is_recognised(kind: str, pre: str) -> None:
    words = tokenizer(kind)
    found = read_vocabulary(words, len(words), [], "it")
    assert found.pre == pre and found.tried > 7000
    assert found.model == ("llama" if kind == "gemma" else "gpt2")


@pytest.mark.parametrize("name", ["tekken", "gpt-4o"])
def test_a_tokenizer_that_llama_cpp_approximates_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    meant = next(one for one in pre_tokenizers.KNOWN if one.name == name)
    core = Tokenizer(models.BPE(ignore_merges=meant.whole_words))
    split = cuts.Split(Regex(meant.stands_for), "isolated")
    core.pre_tokenizer = cuts.Sequence([split, cuts.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=cuts.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(pre_tokenizers.TEXTS * 3, trainer)
    found = read_vocabulary(_other(core), len(core.get_vocab()), [], "it")
    assert found.pre == name and f"llama.cpp's {name} is meant for this tokenizer and reads" in caplog.text


def test_a_tokenizer_from_sentencepiece(caplog: pytest.LogCaptureFixture) -> None:
    """Spaces that llama.cpp adds and the tokenizer does not are said; all else is the same."""
    words = tokenizer("sentencepiece")
    found = read_vocabulary(words, len(words), [], "it")
    assert found.prefix and found.kinds[0] == 2 and found.kinds[3] == 6
    assert "puts a space behind each special token" in caplog.text


def _other(core: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", **options)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("digits", "no pre-tokenizer like this"),
        ("lower", "changes texts before"),
        ("classifier", "adds more than BOS and EOS"),
        ("words", "a WordLevel tokenizer cannot"),
    ],
)
def test_other_tokenizers_are_refused(change: str, says: str) -> None:
    core = Tokenizer.from_str(tokenizer("gpt2").backend_tokenizer.to_str())
    if change == "digits":
        cut = cuts.Split(Regex(r"\p{N}{1,2}(?=(\p{N}{2})*(?!\p{N}))"), "isolated")
        core.pre_tokenizer = cuts.Sequence([cut, cuts.ByteLevel(add_prefix_space=False)])
    elif change == "lower":
        core.normalizer = normalizers.Lowercase()
    elif change == "classifier":
        core.post_processor = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 3)])
    else:
        core = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
        core.decoder = decoders.ByteLevel()
    words = _other(core)
    with pytest.raises(ModelError, match=says):
        read_vocabulary(words, len(words) + 3, [], "it")


def test_a_tokenizer_that_puts_a_space_before_every_text_is_refused() -> None:
    """As GPT-2's tokenizer does with `add_prefix_space`."""
    core = Tokenizer.from_str(tokenizer("gpt2").backend_tokenizer.to_str())
    core.pre_tokenizer = cuts.ByteLevel(add_prefix_space=True)
    with pytest.raises(ModelError, match="no pre-tokenizer like this"):
        read_vocabulary(_other(core), len(core.get_vocab()) + 3, [], "it")


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "every 4th layer"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("smollm", {"hidden_act": "relu"}, "not relu"),
        (
            "smollm",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "no rotary embeddings of type dynamic",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(
    model_dir: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    changes: dict[str, Any],
    says: str,
) -> None:
    source = model_dir(name, **changes)
    assert says in failed([str(source), "--to", "gguf", "--output", str(tmp_path / "x.gguf")], capsys)
    assert not list(tmp_path.iterdir())


def test_a_window_is_said(model_dir: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export(str(model_dir("mistral", sliding_window=6)), "gguf", quant="f32", output=str(tmp_path / "x.gguf"))
    assert "attends to the last 6 tokens only" in caplog.text


def test_other_families(base_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    said = failed([str(base_dir("olmo2")), "--to", "gguf"], capsys)
    assert "olmo2 is not among" in said and "gemma2, gemma3_text, llama, mistral, phi3, qwen2, qwen3, smollm3" in said


def test_a_family_without_a_head_of_its_own(
    model_dir: Callable[..., Path], peft_adapter: Callable[..., tuple[Any, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = peft_adapter(model_dir("gemma"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    tokenizer("gemma").save_pretrained(folder)
    assert "have to be one tensor" in failed([str(folder), "--to", "gguf"], capsys)


@pytest.mark.parametrize(
    ("quant", "says"), [("q4_k_mm", "Did you mean q4_k_m?"), ("Q8", "Did you mean q8_0?"), ("zz", "There are f32, f16")]
)
def test_unknown_formats(capsys: pytest.CaptureFixture[str], quant: str, says: str) -> None:
    assert says in failed(["anything", "--to", "gguf", "--quant", quant], capsys)


def test_formats_by_other_names() -> None:
    assert quants.find_quant("Q4_K_M").name == "q4_k_m" and quants.find_quant("bfloat16").name == "bf16"
    with pytest.raises(ConfigError, match="no 'int4'"):
        quants.find_quant("int4")


def test_what_is_not_installed(
    model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = [str(model_dir("smollm")), "--to", "gguf", "--output", str(tmp_path / "x.gguf"), "--quant"]
    assert "pip install llama-cpp-python" in failed([*call, "q4_k_m"], capsys)
    with monkeypatch.context() as named:
        named.setattr(llama, "is_installed", IS_INSTALLED)
        named.setenv("LUTHIER_LLAMA_PYTHON", "/there/is/none")
        assert "/there/is/none is no file" in failed([*call, "q8_0"], capsys)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'pip install "luthier[gguf]"' in failed([*call, "q8_0"], capsys)


def test_nothing_is_overwritten_or_left_half(
    model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = [str(model_dir("smollm")), "--to", "gguf", "--output", str(tmp_path)]
    assert main(["export", *call]) == 0
    said = capsys.readouterr().err
    assert "needs 0.1 MB of disk" in said and "are free" in said
    first = (tmp_path / "smollm-q8_0.gguf").read_bytes()
    assert "--overwrite" in failed(call, capsys)
    other = tmp_path / "Modelfile-smollm-f16"
    other.write_text("mine", encoding="utf-8")
    assert "Modelfile-smollm-f16 is there already" in failed([*call, "--quant", "f16"], capsys)
    other.unlink()

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write.quants, "quantised", broken)
        assert "No space left on device" in failed([*call, "--overwrite"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "smollm-q8_0.gguf"]
    assert (tmp_path / "smollm-q8_0.gguf").read_bytes() == first
    assert main(["export", *call, "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["export", *call, "--quant", "f16", "--no-check"]) == 0  # a second file has a Modelfile of its own
    assert "and a Modelfile-smollm-f16 for Ollama beside it" in capsys.readouterr().err
    for modelfile, weights in (("Modelfile", "q8_0"), (other.name, "f16")):
        assert (tmp_path / modelfile).read_text().startswith(f"FROM ./smollm-{weights}.gguf\n")


def test_too_large_for_16_bits(
    model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "large"
    model = loaded(model_dir("smollm"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(source)
    tokenizer("smollm").save_pretrained(source)
    assert "take --quant bf16" in failed([str(source), "--to", "gguf", "--quant", "f16"], capsys)


def test_a_model_saved_in_4_bits(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """It is read as the numbers behind its codes."""
    four = export(str(model_dir("smollm")), "merged-4bit", output=str(tmp_path / "four"))
    file = export(str(four), "gguf", quant="f32", output=str(tmp_path / "x.gguf"))
    from luthier.export.quantised import unpacked
    from luthier.export.shards import Checkpoint

    expected = unpacked(Checkpoint(four), "model.layers.0.mlp.up_proj.weight").float().numpy()
    found = {t.name: t.data for t in gguf.GGUFReader(file).tensors}["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(found, expected)


def test_every_model_is_of_a_family_that_is_exported() -> None:
    from luthier.export.gguf.families import FAMILIES

    assert {family for family, _, _ in MODELS.values()} == set(FAMILIES)
