"""`--engine vllm` against a stand-in that takes what vLLM's documentation says, and nothing else. vLLM itself is not
among the packages of the tests."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import main
from luthier.config import Config
from luthier.generate import vllm as ours
from luthier.models.assemble import find


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class SamplingParams:
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: list[str] | None
    stop_token_ids: list[int]
    seed: int | None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stand-in was asked for."""
    seen: dict[str, Any] = {"portions": []}

    class LLM:
        def __init__(
            self, model: str, *, tokenizer: str, revision: str | None, trust_remote_code: bool,
            quantization: str | None = None, enable_lora: bool = False, max_lora_rank: int = 16,
        ) -> None:  # fmt: skip
            seen["llm"] = {"model": model, "tokenizer": tokenizer, "quantization": quantization,
                           "enable_lora": enable_lora, "max_lora_rank": max_lora_rank}  # fmt: skip

        def generate(
            self, prompts: list[Any], sampling_params: list[SamplingParams], *, use_tqdm: bool, lora_request: Any
        ) -> list[Any]:
            assert not use_tqdm
            seen["portions"].append((prompts, sampling_params))
            seen["lora"] = lora_request
            ends = ["stop", "length"] * len(prompts)
            out = types.SimpleNamespace
            return [
                out(outputs=[out(text=f"said {len(prompt['prompt_token_ids'])}", token_ids=(5, 6), finish_reason=end)])
                for prompt, end in zip(prompts, ends, strict=False)
            ]

    package, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.LLM, package.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest  # type: ignore[attr-defined]
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def ask(model: Path, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "hello"}\n{"prompt": ""}\n')
    files = ["--data", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "a.jsonl"), "--overwrite"]
    assert main(["generate", str(model), *files, "--engine", "vllm", *options]) == 0
    return [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]


def adapter(folder: Path, base: Path, **values: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 20, **values})
    )
    return folder


def test_a_model_gets_the_ids_and_the_values_of_our_own_engine(
    calls: dict[str, Any], toy_llama_dir: Path, toy_tokenizer: Any, tmp_path: Path
) -> None:
    found = ask(toy_llama_dir, tmp_path, "--temperature", "0.7", "--stop", "END", "--seed", "4")
    [(prompts, parameters)] = calls["portions"]
    ids = toy_tokenizer("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert prompts == [{"prompt_token_ids": ids}] * 2
    ends = sorted(toy_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    seeds = [each.seed for each in parameters]
    assert len(set(seeds)) == 2  # the same prompt twice: two samples
    window = 512
    assert parameters == [
        SamplingParams(min(512, window - len(ids)), 0.7, 1.0, 50, 0.0, 1.0, ["END"], ends, seed) for seed in seeds
    ]
    assert calls["lora"] is None
    assert calls["llm"]["model"] == calls["llm"]["tokenizer"] == str(toy_llama_dir)
    assert [line["answer"] for line in found] == [f"said {len(ids)}", f"said {len(ids)}", None]
    assert [line["finish_reason"] for line in found] == ["stop", "length", None]


def test_greedy_samples_nothing(calls: dict[str, Any], toy_llama_dir: Path, tmp_path: Path) -> None:
    ask(toy_llama_dir, tmp_path, "--greedy", "--max-new-tokens", "9")
    [(_, [first, _])] = calls["portions"]
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k, first.seed) == (9, 0.0, 1.0, -1, None)


def test_an_adapter_goes_beside_its_base(calls: dict[str, Any], toy_llama_dir: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "run", toy_llama_dir, rank_pattern={"q_proj": 40})
    ask(folder, tmp_path)
    assert calls["lora"] == LoRARequest("run", 1, str(folder))
    assert calls["llm"] == {"model": str(toy_llama_dir), "tokenizer": str(toy_llama_dir), "quantization": None,
                            "enable_lora": True, "max_lora_rank": 64}  # fmt: skip


def test_a_base_of_4_bits_stays_so(calls: dict[str, Any], toy_llama_dir: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "run", toy_llama_dir)
    values = {"base_model": str(toy_llama_dir), "datasets": [{"path": "d.jsonl", "type": "alpaca"}]}
    for bits, quantization in (("4", "bitsandbytes"), ("8", None)):
        run = Config.from_flat({**values, "adapter": "lora", f"load_in_{bits}bit": True})
        (folder / "config.yaml").write_text(run.to_yaml())
        if quantization:
            ask(folder, tmp_path)
            assert calls["llm"]["quantization"] == quantization
        else:
            with pytest.raises(ours.ModelError, match="8 bits"):
                ours._storage(find(str(folder)))


@pytest.mark.parametrize(
    ("values", "said"),
    [({"use_dora": True}, "plain LoRA"), ({"modules_to_save": ["lm_head"]}, "plain LoRA"), ({"r": 900}, "rank 900")],
)
def test_what_it_cannot_apply_is_an_error(
    values: dict[str, Any], said: str, calls: dict[str, Any], toy_llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ours.ModelError, match=said):
        ours._largest_rank(adapter(tmp_path / "run", toy_llama_dir, **values))


def test_without_vllm_there_is_one_error(
    toy_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    files = ["--data", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "a.jsonl")]
    assert main(["generate", str(toy_llama_dir), *files, "--engine", "vllm"]) == 2
    error = capsys.readouterr().err
    assert "pip install vllm" in error
    assert error.count("\n") == 1
