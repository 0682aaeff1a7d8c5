"""What a notebook saves of its model: the adapter, a merged model, GGUF files, a repository on the hub.

A model in memory is first written as an adapter with its tokenizer (or, without an adapter, as a model), and then
`luthier.export` makes of that folder what it makes of a run's.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from luthier.api.devices import Added, check_device
from luthier.api.said import say_once
from luthier.errors import ConfigError, ModelError
from luthier.export.folder import RECORD
from luthier.export.save import export

log = logging.getLogger("luthier")

_METHODS = {
    "lora": "lora",
    "merged_16bit": "merged_16bit",
    "16bit": "merged_16bit",
    "merged_4bit": "merged_4bit",
    "merged_4bit_forced": "merged_4bit",
    "4bit": "merged_4bit",
}


class Model(Added):
    """The methods that a model of `FastLanguageModel` has beside those of its own class."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, str | int):
            check_device(f'model.to("{device}")', device)
        return super().to(*args, **kwargs)  # type: ignore[misc]

    def cuda(self, device: int | str | None = None) -> Any:
        check_device("model.cuda()", "cuda" if device is None else device)
        return super().cuda(device)  # type: ignore[misc]

    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        **others: Any,
    ) -> None:
        """Write a folder that loads without PEFT.

        Args:
            save_method: `merged_16bit` (safetensors in shards), `merged_4bit` (bitsandbytes' NF4), or `lora` (the
                adapter alone). others: Unsloth's further arguments, of which those about the hub are refused.

        Raises:
            LuthierError: it cannot be written; the folder is as it was.
        """
        method = _method(save_method)
        _check_others("save_pretrained_merged", others)
        folder = Path(save_directory).expanduser()
        if method == "lora" or not _has_adapter(self):
            if method == "merged_4bit":
                raise ModelError(
                    f'save_method="{save_method}": the model has no adapter to merge; model.save_pretrained(...) '
                    "writes it as it is"
                )
            if _has_adapter(self) and (folder / "config.json").is_file():
                raise ConfigError(
                    f'save_method="lora": {folder} holds a whole model, and transformers would load it together with '
                    "the adapter: choose another folder"
                )
            _write(self, folder, tokenizer)
            return
        with as_folder(self, tokenizer, folder.resolve().name) as source:
            to = "merged" if method == "merged_16bit" else "merged-4bit"
            export(str(source), to, output=str(folder), overwrite=True)
            _rename_in_record(folder / RECORD, source)

    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] | None = "q8_0",
        **others: Any,
    ) -> list[Path]:
        """Write a GGUF file for each quantisation; returns their paths.

        Args:
            quantization_method: llama.cpp's names (`f16`, `q8_0`, `q4_k_m`, ...), one or several. Unsloth's
                `not_quantized`, `fast_quantized` and `quantized` are f16, q8_0 and q4_k_m.

        Raises:
            LuthierError: a method or a family that cannot be written.
        """
        _check_others("save_pretrained_gguf", others)
        asked = quantization_method or "q8_0"
        methods = [_quant(method) for method in ([asked] if isinstance(asked, str) else asked)]
        folder = Path(save_directory).expanduser()
        files = [folder / f"{folder.resolve().name}-{method}.gguf" for method in methods]
        with as_folder(self, tokenizer, folder.resolve().name) as source:
            for method, file in zip(methods, files, strict=True):
                export(str(source), "gguf", quant=method, output=str(file), overwrite=True)
        return files

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """Upload the adapter (or the model) to a repository, private unless `private=False` is written."""
        return _push(self, repo_id, None, **_of_push("push_to_hub", args, kwargs))

    def push_to_hub_merged(
        self, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **kwargs: Any
    ) -> str:
        """Merge, and upload the result."""
        method = _method(save_method)
        options = _of_push("push_to_hub_merged", (), kwargs)
        if method == "lora":
            return _push(self, repo_id, tokenizer, **options)
        with tempfile.TemporaryDirectory() as place:
            merged = Path(place) / "merged"
            self.save_pretrained_merged(merged, tokenizer, save_method=method)
            return _upload(merged, repo_id, **options)

    def push_to_hub_gguf(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """Not here: raises ConfigError with the two lines to write."""
        raise ConfigError(
            'push_to_hub_gguf: write model.save_pretrained_gguf("gguf", tokenizer, quantization_method=...), '
            f'then `luthier push FOLDER {repo_id} --gguf FILE` in a shell, where FOLDER has the saved adapter'
        )


@contextmanager
def as_folder(model: Any, tokenizer: Any, name: str) -> Iterator[Path]:
    """The model as `luthier.export` reads it: an adapter with its tokenizer and what its base was loaded with.

    Args:
        name: of the folder, and with it of the model in what is written.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        folder = Path(place) / (name or "model")
        _write(model, folder, tokenizer)
        if _has_adapter(model) and (config := _config_of(model, tokenizer)) is not None:
            (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        yield folder


def _write(model: Any, folder: Path, tokenizer: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        say_once("no tokenizer was given to be saved with the model: write model.save_...(path, tokenizer)")


def _has_adapter(model: Any) -> bool:
    return isinstance(model, PeftModel)


def _rename_in_record(record: Path, source: Path) -> None:
    """The adapter came from memory; the folder that it went through is gone."""
    text = record.read_text(encoding="utf-8")
    record.write_text(text.replace(json.dumps(str(source)), '"the adapter in memory"'), encoding="utf-8")


def _config_of(model: Any, tokenizer: Any) -> Any:
    notes = getattr(model.get_base_model(), "luthier_notes", None)
    if notes is None or notes.run is not None:
        return None if notes is None else notes.run
    kind = "chat_template" if getattr(tokenizer, "chat_template", None) else "completion"
    return notes.loading.replace("saving", datasets=[{"path": "none", "type": kind}])


def _push(model: Any, repo_id: str, tokenizer: Any, **options: Any) -> str:
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        folder = Path(place) / "model"
        folder.mkdir()
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return _upload(folder, repo_id, **options)


def _upload(folder: Path, repo_id: str, **options: Any) -> str:
    from luthier.export.hub import push

    return push(folder, repo_id, **options)


def _of_push(where: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """transformers' arguments as `export.hub.push` has them."""
    names = {"commit_message": "message", "private": "private", "revision": "revision", "token": "token"}
    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in names:
            found[names[name]] = value
        elif value not in (None, False):
            say_once(f"{where}: {name} has no effect here: `luthier push` says what is uploaded and how")
    if args:
        raise ConfigError(f"{where}: write arguments after the repository by name, such as token=..., private=True")
    if found.get("private") is None:
        found["private"] = True
        log.info("%s: a new repository is private; write private=False to make it public", where)
    return found


def _method(name: str) -> str:
    if name not in _METHODS:
        raise ConfigError(f'save_method="{name}": write one of merged_16bit, merged_4bit, lora')
    return _METHODS[name]


def _quant(name: str) -> str:
    aliases = {"not_quantized": "f16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
    return aliases.get(name, name).lower()


def _check_others(where: str, others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name == "push_to_hub" and value:
            raise ConfigError(f"{where}: push_to_hub=True: write model.push_to_hub_merged(repo, tokenizer) instead")
        if value not in (None, False):
            say_once(f"{where}: {name} has no effect here: luthier.export chooses by the memory and disk there is")
