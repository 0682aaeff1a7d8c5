"""Loading a tokenizer as a config wants it, and the tokens at which generation stops.

Whatever a config changes (special tokens, further tokens, the chat template) is set on the tokenizer itself,
so that it is saved with the adapter and every other program that loads the folder sees the same.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.artifacts.source import local
from luthier.config import Config, DatasetEntry
from luthier.data import templates
from luthier.data.chat import ChatTemplate
from luthier.data.encode import TextEncoder
from luthier.data.hub import notice_missing_network
from luthier.errors import ConfigError, ModelError, cannot_load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("luthier")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of a config, with its tokens and chat template set.

    Raises:
        ModelError: not found, gated, unreadable, or without an EOS token.
        ConfigError: no such tokenizer class or template, or a dataset of conversations without any template.

    Returns:
        The tokenizer; its `new_tokens` lists what the config added to its vocabulary.
    """
    tokenizer = _load(config)
    # Kept on the tokenizer, because nothing else can tell them later from tokens that came with it.
    tokenizer.new_tokens = _set_tokens(tokenizer, config)
    source = config.model.tokenizer_config or config.model.base_model
    if tokenizer.eos_token_id is None:
        added = sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().__getitem__)
        hint = f" Tokens of this tokenizer that may be meant: {', '.join(added[:12])}." if added else ""
        raise ModelError(
            f"the tokenizer of {source} has no EOS token, so no answer could end. Name it with "
            f"special_tokens: {{eos_token: ...}}.{hint}"
        )
    _set_template(tokenizer, config)
    for token in config.data.eot_tokens or ():
        _single_token(tokenizer, token, config.place("eot_tokens"))
    return tokenizer


def terminator_ids(tokenizer: PreTrainedTokenizerBase, config: Config) -> tuple[int, ...]:
    """Ids at which generation stops: EOS, what ends an answer in the chat templates, and `eot_tokens`."""
    ends = list(config.data.eot_tokens or ())
    if tokenizer.chat_template:
        choices = {entry.chat_template for entry in config.data.datasets if _templated(entry)} or {None}
        for choice in sorted(choices, key=str):
            ends += chat_template_of(tokenizer, config, choice).habits.last_terminators
    ids = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(token) for token in ends)]
    return tuple(dict.fromkeys(number for number in ids if isinstance(number, int)))


def chat_template_of(tokenizer: PreTrainedTokenizerBase, config: Config, choice: str | None) -> ChatTemplate:
    """The template that a dataset entry chooses (None: the tokenizer's), ready to render.

    Raises:
        ConfigError: no such template.
    """
    own = tokenizer.chat_template
    override = templates.chosen(choice, None, own)
    return ChatTemplate(
        tokenizer,
        override if isinstance(override, str) and override != own else None,
        config.data.chat_template_kwargs,
        config.data.eot_tokens or (),
    )


def is_chat(kind: Any) -> bool:
    """Whether a dataset entry's `type` needs a chat template."""
    return isinstance(kind, str) and kind.startswith("chat_template")


def _templated(entry: DatasetEntry) -> bool:
    """Whether an entry says that it uses a template; rows of preference data without a type may use one too."""
    return is_chat(entry.type) or (entry.type is None and entry.chat_template is not None)


def _load(config: Config) -> PreTrainedTokenizerBase:
    import transformers

    model = config.model
    source = local(model.tokenizer_config or model.base_model)
    loader = getattr(transformers, model.tokenizer_type, None)
    if loader is None:
        raise ConfigError(
            f"{config.place('tokenizer_type')}tokenizer_type: transformers {transformers.__version__} has no "
            f"class {model.tokenizer_type!r}"
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not any((folder / name).exists() for name in _TOKENIZER_FILES):
            raise ModelError(
                f"{source} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); name another place "
                "with tokenizer_config"
            )
    elif folder.exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelError(f"cannot load the tokenizer: {source} {what}")
    else:
        notice_missing_network()
    try:
        return loader.from_pretrained(
            str(folder) if folder.is_dir() else source,
            revision=model.revision if model.tokenizer_config is None else None,
            trust_remote_code=model.trust_remote_code,
        )
    except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
        raise cannot_load("tokenizer", source, error) from error


def _set_tokens(tokenizer: PreTrainedTokenizerBase, config: Config) -> list[str]:
    """Set the configured tokens; returns those that the vocabulary did not have."""
    special = config.model.special_tokens
    before = len(tokenizer)
    named = {
        name: value
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (value := getattr(special, name)) is not None
    }
    old_bos = tokenizer.bos_token_id
    puts_bos = "bos_token" in named and old_bos is not None and TextEncoder(tokenizer).opening == [old_bos]
    if named:
        tokenizer.add_special_tokens(named)
    if puts_bos and tokenizer.is_fast and tokenizer.bos_token_id != old_bos:
        tokenizer.add_bos_token = True  # has the new one put before texts instead of the old one
    if special.additional_special_tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(special.additional_special_tokens)},
            replace_extra_special_tokens=False,
        )
    if config.model.tokens:
        tokenizer.add_tokens(list(config.model.tokens))
    new = [str(name) for name in tokenizer.convert_ids_to_tokens(list(range(before, len(tokenizer))))]
    if new:
        log.info(
            "%d token%s added to the vocabulary: %s",
            len(new),
            "s" if len(new) > 1 else "",
            ", ".join(new[:8]),
        )
    return new


def _set_template(tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    data = config.data
    own = tokenizer.chat_template
    chosen = _chosen(config, "chat_template", data.chat_template, data.chat_template_jinja, own)
    for key in ("datasets", "test_datasets"):
        for at, entry in enumerate(getattr(data, key)):
            _chosen(config, f"{key}.{at}.chat_template", entry.chat_template, None, own)
    entries = [entry for entry in (*data.datasets, *data.test_datasets) if _templated(entry)]
    if data.chat_template is None and data.chat_template_jinja is None and entries:
        # The entries agree on a template of their own: then it is the one that is saved with the model.
        of_entries = {entry.chat_template for entry in entries}
        if len(of_entries) == 1 and (only := of_entries.pop()) is not None:
            chosen = templates.chosen(only, None, tokenizer.chat_template)
    tokenizer.chat_template = chosen
    if chosen is None and any(entry.chat_template in (None, "tokenizer_default") for entry in entries):
        source = config.model.tokenizer_config or config.model.base_model
        raise ConfigError(
            f"a dataset of type chat_template needs a chat template, and the tokenizer of {source} "
            f"brings none. Set chat_template to one of {', '.join(templates.names())}, or to the path of a .jinja file."
        )


def _chosen(
    config: Config, key: str, choice: str | None, jinja: str | None, own: str | dict[str, str] | None
) -> str | dict[str, str] | None:
    try:
        return templates.chosen(choice, jinja, own)
    except ConfigError as error:
        raise ConfigError(f"{config.place(key)}{error}") from error


def _single_token(tokenizer: PreTrainedTokenizerBase, token: str, place: str) -> int:
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    known = tokenizer.convert_tokens_to_ids(token)
    if isinstance(known, int) and known != tokenizer.unk_token_id and list(ids) == [known]:
        return known
    raise ConfigError(
        f"{place}eot_tokens: {token!r} is not one token of this tokenizer but {len(ids)}. Add it with "
        f"`tokens: [{token!r}]` (its embedding has to be trained then), or name the token that ends a turn "
        "in this model's template."
    )
