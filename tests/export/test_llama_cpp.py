"""GGUF files in llama.cpp itself, beside the models that they were made of: tokens, logits, greedy text.

Needs llama-cpp-python in this Python, or in the one that LUTHIER_LLAMA_PYTHON names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import luthier
from luthier.cli import main
from luthier.export.gguf import llama
from luthier.export.gguf.pieces import read_pieces
from luthier.export.gguf.pre_tokenizers import KNOWN, TEXTS, PreTokenizer, _rebuilt, sample
from luthier.export.save import export
from tests.export.gguf_models import MODELS, save_model, tokenizer

DEMO = Path(luthier.__file__).parent / "demo" / "base_model"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not llama.is_installed(), reason=f"no llama-cpp-python here, and {llama.PYTHON} names none"),
]

# Root mean square of the logits' differences over that of the logits. ggml looks GELU, Gemma's activation, up in a
# table of 16-bit numbers, so that fp32 is not exact there.
EXACT, GELU = 1e-6, 1e-3
# Beside a model with the same rounded weights: ggml rounds what is multiplied with them, too, to 16 or to 8 bits.
WITHIN = {"f16": 1e-3, "bf16": 1e-2, "q8_0": 3e-2, "q5_0": 3e-2, "q4_0": 3e-2, "q4_k_m": 3e-2, "q6_k": 3e-2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            # Rows of 256 numbers, which K formats need.
            made[name] = save_model(name, tmp_path_factory.mktemp("model") / name, intermediate_size=256)
        return made[name]

    return make


def compared(source: Path, file: Path, model: Any = None, new: int = 8) -> tuple[float, bool]:
    """Share of the logits that differs, and whether the greedy text is the same; ids are asserted."""
    words = AutoTokenizer.from_pretrained(source)
    model = model or AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    special = ["<|im_start|>user\nHello  there<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>b", "<|im_start|>"]
    texts = [text for text in [*TEXTS, *special] if text]
    # A space that the tokenizer does not put: before one, and behind a special token. See `pieces.differing`.
    is_first = '"prepend_scheme":"first"' in words.backend_tokenizer.to_str().replace(" ", "")
    same_texts = [t for t in texts if not is_first or (t[0] != " " and "<|im" not in t)]
    ids = [list(words(text)["input_ids"]) for text in texts]
    ids.append([one for each in ids for one in each][:700])  # beyond the windows and the lengths before scaling
    found = llama.read(file, same_texts, ids, new=new)
    assert found.ids == [list(words(text)["input_ids"]) for text in same_texts]
    wrong, every, same = [], [], True
    for one, theirs, greedy in zip(ids, found.logits, found.greedy, strict=True):
        with torch.no_grad():
            ours = model(input_ids=torch.tensor([one]), use_cache=False).logits[0].float().numpy()
            following = model.generate(torch.tensor([one]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        wrong.append((theirs - ours).ravel())
        every.append((ours - ours.mean(-1, keepdims=True)).ravel())
        same &= following[0, len(one) :].tolist() == greedy
    return float(np.sqrt(np.square(np.concatenate(wrong)).mean() / np.square(np.concatenate(every)).mean())), same


@pytest.mark.parametrize("name", [name for name in MODELS if name != "phi3-long"])
def test_a_family_in_fp32(model_dir: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    source = model_dir(name)
    file = export(str(source), "gguf", quant="f32", output=str(tmp_path / "x.gguf"), check=False)
    error, same = compared(source, file)
    assert error < (GELU if name.startswith("gemma") else EXACT) and same


@pytest.mark.parametrize("length", [400, 700])
def test_longrope(model_dir: Callable[[str], Path], tmp_path: Path, length: int) -> None:
    """On both sides of the length that the model had before; llama.cpp chooses by its context, transformers by the
    text."""
    source = model_dir("phi3-long")
    file = export(str(source), "gguf", quant="f32", output=str(tmp_path / "x.gguf"), check=False)
    ids = torch.randint(3, 400, (1, length), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits[0].numpy()
    (theirs,) = llama.read(file, [], ids.tolist()).logits
    assert np.abs(theirs - ours).max() < 3e-5 * ours.std()


@pytest.mark.parametrize("quant", list(WITHIN))
@pytest.mark.parametrize("name", ["smollm", "gemma2"])
def test_formats(model_dir: Callable[[str], Path], tmp_path: Path, name: str, quant: str) -> None:
    source = model_dir(name)
    file = export(str(source), "gguf", quant=quant, output=str(tmp_path / "x.gguf"), check=False)
    rounded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    rounded.load_state_dict(
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    )
    error, _ = compared(source, file, rounded)
    assert error < WITHIN[quant]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "x.gguf"]


@pytest.mark.parametrize("pre", KNOWN, ids=lambda pre: pre.name)
def test_expressions_are_those_of_llama_cpp(tmp_path: Path, pre: PreTokenizer) -> None:
    """A tokenizer with our expression beside llama.cpp's own under that name, on all texts that are tried."""
    spec = json.loads(tokenizer("gpt2").backend_tokenizer.to_str())
    words = PreTrainedTokenizerFast(tokenizer_object=_rebuilt(spec, pre), eos_token="<|endoftext|>")
    source = save_model("llama-linear-biases", tmp_path / "model")
    words.save_pretrained(source)
    file = export(str(source), "gguf", quant="q8_0", output=str(tmp_path / "x.gguf"), check=False)
    found: Any = GGUFReader(file).fields["tokenizer.ggml.pre"].contents()
    texts = [text for text in sample(spec) if "\0" not in text]
    if found == pre.name:  # some differ on no text with this small vocabulary
        assert llama.read(file, texts, []).ids == words(texts)["input_ids"]
    else:
        assert KNOWN.index(pre) > [one.name for one in KNOWN].index(found)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_pieces_are_joined_as_llama_cpp_does(model_dir: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Our reading of its algorithm, with the spaces that it puts."""
    source = model_dir(name)
    words = AutoTokenizer.from_pretrained(source)
    pieces = read_pieces(json.loads(words.backend_tokenizer.to_str()), name)
    file = export(str(source), "gguf", quant="q8_0", output=str(tmp_path / "x.gguf"), check=False)
    texts = ["a<|im_end|> b", "<|im_start|>user\n x", *sample({"model": {"vocab": {}}})]
    found = llama.read(file, texts, []).ids
    assert found == [pieces.ids(text) for text in texts]


def test_the_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(DEMO, base)
    for quant in ("f16", "q4_k_m"):
        assert main(["export", str(base), "--to", "gguf", "--quant", quant]) == 0
        said = capsys.readouterr().err
        assert "the same token ids for 18 of 18 texts" in said and "largest difference of a logit" in said


def test_a_wrong_file_is_noticed(
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from luthier.export.gguf import families

    monkeypatch.setattr(families, "turned", lambda value, heads: value)
    call = ["export", str(model_dir("llama3")), "--to", "gguf", "--quant", "f32", "--output", str(tmp_path / "x.gguf")]
    assert main(call) == 1
    assert "computes another model" in capsys.readouterr().err


def test_a_file_that_llama_cpp_cannot_open(tmp_path: Path) -> None:
    from luthier.errors import RunError

    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RunError, match="cannot be read by llama.cpp: "):
        llama.read(tmp_path / "x.gguf", ["a"], [[1]])


def test_chat_templates_render_the_same(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """The template in the file, by the renderer of the binding's own kind (jinja2 with its two trims)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    base = tmp_path / "base"
    shutil.copytree(DEMO, base)
    file = export(str(base), "gguf", quant="q8_0", output=str(tmp_path / "x.gguf"), check=False)
    text: Any = GGUFReader(file).fields["tokenizer.chat_template"].contents()
    messages = [{"role": r, "content": f"{r} says"} for r in ("user", "assistant", "user")]
    words = AutoTokenizer.from_pretrained(base)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    for header in (False, True):
        theirs = environment.from_string(text).render(messages=messages, add_generation_prompt=header)
        assert theirs == words.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
