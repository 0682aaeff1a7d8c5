"""Every key of Axolotl's and LLaMA-Factory's, with values that it may and may not have: one list, and no traceback."""

from __future__ import annotations

from types import ModuleType

import pytest

from luthier.config import Config
from luthier.config.convert import arguments, axolotl, axolotl_keys, llamafactory, llamafactory_keys
from luthier.config.schema import FIELDS
from luthier.config.yaml_source import Source
from luthier.errors import ConfigError

VALUES: tuple[object, ...] = (None, True, 1, "x", ["x"], [[1]], [{"path": 5}], {"a": {"b": 1}}, {}, [])


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize(
    ("tool", "names", "base"),
    [
        (axolotl, axolotl_keys.ALL | set(FIELDS), "base_model"),
        (llamafactory, llamafactory_keys.ALL | arguments.KNOWN, "model_name_or_path"),
    ],
    ids=["axolotl", "llamafactory"],
)
def test_a_key_ends_in_one_list(tool: ModuleType, names: set[str], base: str, value: object) -> None:
    for name in sorted(names):
        found = tool.convert(Source("f.yml", values={base: "m", name: value}))
        report = found.report
        listed = [
            item.key for each in (report.carried, report.no_effect, report.unsupported, report.unknown) for item in each
        ]
        assert len(listed) == len(set(listed)), name
        assert any(key == name or key.startswith(f"{name}.") for key in listed), name
        assert all(key in report.text() for key in listed)
        try:
            report.raise_for(allow_unsupported=True)
            Config.from_source(found.result())
        except ConfigError:
            pass  # datasets are missing
