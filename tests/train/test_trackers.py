"""Trackers: TensorBoard for real, the others by what reaches their packages."""

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from luthier.config import LoggingConfig
from luthier.errors import ConfigError
from luthier.train.trackers import Trackers, tracker_names

SAMPLES = [
    {"step": 1, "prompt": "a|b\nc", "text": "yes", "expected": None, "stopped": True, "top_p": 1.0},
    {"step": 1, "prompt": "d", "text": "no", "expected": None, "stopped": False, "top_p": 1.0},
]


def state_of_accelerate() -> dict[str, Any]:
    from accelerate import PartialState

    return dict(PartialState._shared_state)


def test_which_trackers_are_on() -> None:
    assert tracker_names(LoggingConfig()) == []
    assert tracker_names(LoggingConfig(report_to="mlflow")) == ["mlflow"]
    assert tracker_names(LoggingConfig(report_to=["tensorboard"], wandb_project="p")) == [
        "tensorboard",
        "wandb",
    ]


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = state_of_accelerate()
    trackers = Trackers(
        LoggingConfig(report_to="tensorboard"), tmp_path, {"base_model": "m", "datasets": [{"path": "p"}]}
    )
    for step, loss in ((1, 2.5), (2, 1.5)):
        trackers.log({"step": step, "loss": loss, "learning_rate": 1e-4, "note": "text", "flag": True}, step)
    trackers.log_samples(SAMPLES, 2)
    trackers.finish()
    assert state_of_accelerate() == before  # no device, no process group chosen for those who come later
    events = EventAccumulator(str(tmp_path / "trackers" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert set(events.Tags()["scalars"]) == {"loss", "learning_rate"}
    table = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table.splitlines()[0] == "| step | prompt | text | stopped | top_p |"
    assert "| 1 | a\\|b<br>c | yes | True | 1.0 |" in table
    assert list((tmp_path / "trackers").rglob("hparams.yml"))


class FakeRun:
    """What `wandb.init` gives back."""

    def __init__(self) -> None:
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False
        self.broken = False

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self.broken:
            raise OSError("no space left on device")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package, for what is done with it."""
    module: Any = types.ModuleType("wandb")
    module.run, module.asked, module.config = FakeRun(), {}, {}

    def init(**kwargs: Any) -> FakeRun:
        module.asked = kwargs
        return module.run

    module.init = init
    module.config = types.SimpleNamespace(update=lambda values, **kwargs: setattr(module, "settings", values))
    module.Table = lambda columns, data, dataframe=None: {"columns": columns, "data": data}
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_gets_its_keys_and_samples_as_a_growing_table(wandb: Any, tmp_path: Path) -> None:
    section = LoggingConfig(
        wandb_project="proj", wandb_entity="me", wandb_name="first", wandb_tags=["a"], wandb_job_type="train",
        wandb_mode="offline",
    )  # fmt: skip
    trackers = Trackers(
        section, tmp_path, {"base_model": "m", "lora_r": 8, "max_steps": None, "tokens": ["x"]}
    )
    assert wandb.asked == {
        "project": "proj",
        "entity": "me",
        "name": "first",
        "tags": ["a"],
        "job_type": "train",
        "mode": "offline",
        "dir": str(tmp_path / "trackers"),
    }
    assert wandb.settings == {"base_model": "m", "lora_r": 8, "tokens": '["x"]'}
    trackers.log({"step": 3, "loss": 1.0}, 3)
    trackers.log_samples(SAMPLES[:1], 3)
    trackers.log_samples(SAMPLES[1:], 4)
    trackers.finish()
    assert wandb.run.logged[0] == (3, {"loss": 1.0})
    tables = [values["samples"] for _, values in wandb.run.logged[1:]]
    assert [len(table["data"]) for table in tables] == [1, 2]
    assert tables[1]["data"][1][:3] == [1, "d", "no"]
    assert wandb.run.finished


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(
    wandb: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers(LoggingConfig(report_to="wandb"), tmp_path, {})
    wandb.run.broken = True
    with caplog.at_level(logging.WARNING, logger="luthier"):
        for step in range(3):
            trackers.log({"loss": 1.0}, step)
        trackers.log_samples(SAMPLES, 3)
        trackers.finish()
    assert len(caplog.records) == 1
    assert "wandb failed" in caplog.text
    assert "no space left on device" in caplog.text


def test_a_tracker_that_cannot_start_is_an_error_at_once(wandb: Any, tmp_path: Path) -> None:
    def refuse(**kwargs: Any) -> None:
        raise RuntimeError("no API key configured\nand much more")

    wandb.init = refuse
    with pytest.raises(
        ConfigError, match=r"wandb cannot start: no API key configured\. .*wandb_mode: offline"
    ):
        Trackers(LoggingConfig(report_to="wandb"), tmp_path, {})


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "tensorboard"])
def test_a_missing_package_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed .*pip install 'luthier\[{name}\]'"):
        Trackers(LoggingConfig(report_to=name), tmp_path, {})  # type: ignore[arg-type]
