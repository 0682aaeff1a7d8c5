"""What LLaMA-Factory's `dataset_info.json` says of a dataset, as an entry of ours.

Rows of its `alpaca` format have a question and an answer, which it sets in the turns of a chat template: here that is a
prompt of one's own, with the template's text in it. Rows of `sharegpt` and `openai` are conversations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.config.convert import llamafactory_keys as keys
from luthier.config.convert.conversion import Conversion

FILE = "dataset_info.json"
_MEDIA = ("images", "videos", "audios")
_KNOWN = {
    "file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "formatting", "ranking",
    "subset", "split", "folder", "num_samples", "columns", "tags", "file_sha1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rows:
    """What of the config decides how rows are read."""

    stage: str
    rl: str | None
    template: str | None
    system: str | None
    max_samples: int | None


def datasets(
    into: Conversion, key: str, target: str, names: list[str], folder: Any, beside: Path, how: Rows
) -> None:
    """The entries of the named datasets at `target`; `folder` is dataset_dir, `beside` the config's own folder."""
    if isinstance(folder, str) and (folder == "ONLINE" or folder.startswith("REMOTE:")):
        into.unsupported(key, f"dataset_dir {folder}: write the datasets with path and type.", essential=True)
        return
    place = next((each for each in _places(folder, beside) if (each / FILE).is_file()), None)
    if place is None:
        tried = ", ".join(str(each / FILE) for each in _places(folder, beside))
        what = f"there is no {FILE} that says what {', '.join(names)} is (tried {tried})."
        into.unsupported(key, what, essential=True)
        return
    try:
        info = json.loads((place / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        into.unsupported(key, f"{place / FILE} cannot be read: {error}", essential=True)
        return
    found = []
    for name in names:
        if not isinstance(info, dict) or not isinstance(info.get(name), dict):
            into.unknown(f"{key}.{name}", set(info), f"{place / FILE}")
            continue
        problem, entry = entry_of(info[name], place, how)
        for unread in sorted(set(info[name]) - _KNOWN):
            into.unknown(f"{key}.{name}.{unread}", _KNOWN, f"{place / FILE}")
        if problem:
            into.unsupported(f"{key}.{name}", problem, essential=True)
        else:
            found.append(entry)
    if found:
        into.also(target, found, key)
        into.carried(key, f"{target}, by {place / FILE}")


def _places(folder: Any, beside: Path) -> list[Path]:
    """Where `dataset_info.json` may be: from the working folder, as LLaMA-Factory has it, or from the config's."""
    named = Path(str(folder or "data"))
    places = [named, beside / named, beside] if folder else [named, beside / named, beside, beside.parent / named]
    return list(dict.fromkeys(places))


def entry_of(info: Mapping[str, Any], place: Path, how: Rows) -> tuple[str, dict[str, Any]]:
    """What is wrong with a dataset, or nothing, and the entry."""
    if "script_url" in info or "cloud_file_name" in info or info.get("folder"):
        return "scripts, clouds and folders of a dataset are not read: give a file or an id of the hub.", {}
    columns = dict(info.get("columns") or {})
    if media := [name for name in _MEDIA if name in columns]:
        return f"its rows have {', '.join(media)}, which are not trained here.", {}
    entry = _source(info, place, how)
    if not entry:
        return "it names neither file_name nor hf_hub_url.", {}
    formatting = info.get("formatting", "alpaca")
    ranking = bool(info.get("ranking"))
    if formatting == "alpaca":
        problem, more = _question_rows(columns, ranking, how)
    elif formatting in ("sharegpt", "openai"):
        problem, more = _conversations(columns, dict(info.get("tags") or {}), ranking, how, formatting)
    else:
        problem, more = f"formatting {formatting}: alpaca, sharegpt and openai are known.", {}
    return problem, entry | more


def _source(info: Mapping[str, Any], place: Path, how: Rows) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    if "hf_hub_url" in info:
        entry["path"] = str(info["hf_hub_url"])
    elif "file_name" in info:
        entry["path"] = os.path.normpath(place / str(info["file_name"]))
    else:
        return {}
    counts = [count for count in (info.get("num_samples"), how.max_samples) if count]
    if counts:
        entry["path"] += f"#{min(counts)}"
    if info.get("subset"):
        entry["name"] = info["subset"]
    if info.get("split", "train") != "train":
        entry["split"] = info["split"]
    return entry


def _question_rows(columns: dict[str, str], ranking: bool, how: Rows) -> tuple[str, dict[str, Any]]:
    names = columns or {"prompt": "instruction", "query": "input", "response": "output"}
    if how.stage == "pt":
        return "", {"type": "completion", "field": names.get("prompt", "text")}
    if names.get("history"):
        return "a column of earlier turns (history) is not read: write the rows as conversations.", {}
    template = keys.TEMPLATES.get(str(how.template))
    if template is None:
        known = ", ".join(keys.TEMPLATES)
        return (
            f"rows with a question and an answer need the text of template {how.template}, which is known of {known}: "
            "write a mapping as type, with format.",
            {},
        )
    if how.rl is not None:
        return _pairs(names, ranking, how, template)
    prompt: dict[str, Any] = {
        name: names[column]
        for name, column in (
            ("field_instruction", "prompt"), ("field_input", "query"), ("field_output", "response"),
            ("field_system", "system"),
        )
        if column in names
    }  # fmt: skip
    system = how.system or template.default_system
    if template.system is None and (system or "system" in names):
        return f"template {how.template} sets the system text inside of the question: write a mapping as type.", {}
    if system:
        prompt["system_prompt"] = system
    if template.system is not None:
        prompt["system_format"] = _in_place(template.system, "{system}")
    prompt["format"] = _in_place(template.user, "{instruction}\n{input}")
    prompt["no_input_format"] = _in_place(template.user, "{instruction}")
    return "", {"type": prompt}


def _pairs(names: Mapping[str, str], ranking: bool, how: Rows, template: keys.Template) -> tuple[str, dict[str, Any]]:
    if names.get("query"):
        return "a second column of the question (query) is not read in preference rows.", {}
    kind: dict[str, Any] = {"field_prompt": names.get("prompt", "instruction")}
    if how.rl == "kto" and "kto_tag" in names:
        kind |= {"field_completion": names.get("response", "output"), "field_label": names["kto_tag"]}
    elif ranking and {"chosen", "rejected"} <= set(names):
        kind |= {"field_chosen": names["chosen"], "field_rejected": names["rejected"]}
    else:
        return f"its rows are not those of rl: {how.rl} (ranking with chosen and rejected, or kto_tag).", {}
    if "system" in names:
        kind["field_system"] = names["system"]
    kind["prompt_format"] = _in_place(template.user, "{prompt}")
    return "", {"type": kind}


def _in_place(text: str, place: str) -> str:
    return text.replace("{}", place)


# Of LLaMA-Factory's tags: what the role is called here.
_ROLES = {
    "user": "user_tag", "assistant": "assistant_tag", "tool": "observation_tag", "system": "system_tag",
}  # fmt: skip
_TAGS = {
    "sharegpt": {
        "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "observation_tag": "observation", "system_tag": "system", "function_tag": "function_call",
    },
    "openai": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "observation_tag": "tool", "system_tag": "system", "function_tag": "function_call",
    },
}  # fmt: skip


def _conversations(
    columns: dict[str, str], written: dict[str, str], ranking: bool, how: Rows, formatting: str
) -> tuple[str, dict[str, Any]]:
    if how.stage == "pt":
        return "conversations are not trained as plain text: `stage: sft` with train_on_prompt does that.", {}
    tags = _TAGS[formatting] | written
    entry: dict[str, Any] = {"type": "chat_template" if how.rl is None else "chat_template.default"}
    messages = columns.get("messages", "conversations")
    if messages != "messages":
        entry["field_messages"] = messages
    names = {"role": tags["role_tag"], "content": tags["content_tag"]}
    if names != {"role": "role", "content": "content"}:
        entry["message_property_mappings"] = names
    roles = {role: [tags[tag]] for role, tag in _ROLES.items() if tags[tag] != role}
    # A call of a tool is a turn of the assistant.
    roles["assistant"] = [*roles.get("assistant", ["assistant"]), tags["function_tag"]]
    entry["roles"] = roles
    if "tools" in columns:
        entry["field_tools"] = columns["tools"]
    if "system" in columns:
        entry["field_system"] = columns["system"]
    if how.rl == "kto":
        if "kto_tag" not in columns:
            return "rows of stage kto need a column kto_tag.", {}
        entry["field_label"] = columns["kto_tag"]
    elif how.rl is not None:
        if not ranking or not {"chosen", "rejected"} <= set(columns):
            return f"rows of rl: {how.rl} need ranking, with columns chosen and rejected.", {}
        entry |= {"field_chosen": columns["chosen"], "field_rejected": columns["rejected"]}
    return "", entry
