"""JSON Schema, help and reference page are made from the keys, and are what they say."""

from __future__ import annotations

import ast
from pathlib import Path

import jsonschema
import pytest
import yaml

from luthier.config.datasets import DatasetEntry, UserPreference, UserPrompt
from luthier.config.distributed import ONE_VALUE, FsdpConfig
from luthier.config.preference import OTHER_NAMES
from luthier.config.reference import help_text, json_schema, markdown
from luthier.config.schema import FIELDS, SECTIONS, SpecialTokens

ROOT = Path(__file__).resolve().parents[2]
MODELS = [*SECTIONS.values(), DatasetEntry, UserPrompt, UserPreference, SpecialTokens, FsdpConfig]
# Keys that are read through a property, or as another key.
READ_AS = {
    "ddp": "strategy",
    "fsdp_version": "strategy",
    "fsdp_config": "fsdp",
    "transformer_layer_cls_to_wrap": "layer_classes",
    "activation_checkpointing": "gradient_checkpointing",
}


@pytest.mark.parametrize("model", MODELS)
def test_every_key_has_help(model):
    assert model.__doc__
    for key, info in model.model_fields.items():
        assert info.description, key
        assert info.description.rstrip().endswith((".", ")")), key


def test_every_key_is_used():
    """A key that nothing reads would be a key that is silently ignored."""
    words: set[str] = set()
    for path in (ROOT / "luthier").rglob("*.py"):
        if path.parent.name != "config":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    words.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    words.add(node.value)
    unused = {key for model in MODELS for key in model.model_fields if READ_AS.get(key, key) not in words}
    assert unused <= {*OTHER_NAMES, *ONE_VALUE}


def test_schema_is_flat_and_strict():
    schema = json_schema()
    assert list(schema["properties"]) == list(FIELDS)
    assert schema["required"] == ["base_model", "datasets"]
    assert schema["additionalProperties"] is False
    for name in ("DatasetEntry", "UserPrompt", "SpecialTokens"):
        assert schema["$defs"][name]["additionalProperties"] is False
    assert schema["properties"]["lora_r"] == {
        "description": "Rank of the adapter's matrices.",
        "default": 16,
        "anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}],
    }


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("seed: 3\nlora_r: null\nlearning_rate: 0.1\nval_set_size: 0.1", True),
        ("seed: x", False),
        ("sed: 3", False),
        ("learning_rate: 0", False),
        ("base_model: null", False),
        ("test_datasets: [{path: a, typ: b}]", False),
        ("test_datasets: [{path: a, type: {format: b}, roles: {user: [a]}}]", True),
        ("test_datasets: [{path: a, type: alpacca}]", False),
        ("val_set_size: -1", False),
        ("eval_steps: 0\nval_set_size: 3", False),
        ("logging_steps: 0.0", False),
        ("report_to: wandb", True),
        ("report_to: [wandb, x]", False),
        ("fsdp_version: 2\nfsdp_config: {fsdp_offload_params: true, state_dict_type: null}", True),
        ("fsdp_version: 2\nfsdp_config: {fsdp_ofload_params: true}", False),
        ("fsdp_version: 1", False),
        ("deepspeed: {zero_optimization: {stage: 2}}", True),
    ],
)
def test_schema_judges_as_the_config_does(text, valid):
    config = {"base_model": "m", "datasets": [{"path": "d", "type": "alpaca"}], **yaml.safe_load(text)}
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(config) == valid


def test_help_lists_every_key():
    text = help_text(80)
    assert max(map(len, text.splitlines())) <= 110
    for key in (key for model in MODELS for key in model.model_fields):
        assert f"\n  {key}  (" in text


def test_reference_page_is_up_to_date():
    page = ROOT / "docs" / "reference" / "config.md"
    assert page.read_text(encoding="utf-8") == markdown(), (
        "python -m luthier.config.reference > docs/reference/config.md"
    )
