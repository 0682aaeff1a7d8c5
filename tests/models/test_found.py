"""What lies at a path, from wherever it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import ModelError
from luthier.models.assemble import find, open_for_inference
from tests.models.toy_folders import adapter_folder


def test_a_base_named_by_a_relative_path_is_found_above_the_run(
    toy_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run has it that was started in `job` with `base_model: models/base`."""
    job, elsewhere = tmp_path / "job", tmp_path / "elsewhere"
    (job / "models").mkdir(parents=True)
    elsewhere.mkdir()
    (job / "models" / "base").symlink_to(toy_llama_dir)
    monkeypatch.chdir(job)
    run = adapter_folder(job / "runs" / "first", Path("models/base"), 0, target_modules=["q_proj"])
    assert find("runs/first").base == "models/base"
    monkeypatch.chdir(elsewhere)
    assert find(str(run)).base == str(job / "models" / "base")
    open_for_inference(str(run))
    (job / "models" / "base").unlink()
    with pytest.raises(ModelError, match="models/base"):
        open_for_inference(str(run))
