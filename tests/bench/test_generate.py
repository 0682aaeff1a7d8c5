"""The benchmark of writing, on a model of two layers: both contenders answer alike, and the table tells of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import generate

pytest.importorskip("peft")


@pytest.mark.slow
def test_both_answer_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "micro", "--prompts", "5", "--new-tokens", "6", "--rounds", "1"]
    assert generate.main([*options, "--work", str(tmp_path), "--results", str(tmp_path / "results")]) == 0
    [path] = (tmp_path / "results").iterdir()
    result = json.loads(path.read_text(encoding="utf-8"))
    [found] = result["rounds"]
    assert found["same_ids"] == 5
    assert found["peft"]["at_once"]["tokens"] == found["luthier"]["one_by_one"]["tokens"] == 30
    assert "the same ids: 5 of 5" in capsys.readouterr().out


def test_the_table_takes_ratios_within_rounds() -> None:
    def one(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "cpu_seconds": 2 * seconds, "tokens": 100}

    def side(one_by_one: float, at_once: float) -> dict[str, object]:
        return {"one_by_one": one(one_by_one), "at_once": one(at_once), "peak_memory_gib": 1.0, "elsewhere": 0.1}

    result = {
        "shape": "tiny",
        "date": "2026-01-01T00:00",
        "commit": "abc",
        "hardware": {"cpu": "a", "cores": 2},
        "prompts": {"source": "x", "count": 3, "one_by_one": 3},
        "new_tokens": 5,
        "rounds": [
            {"luthier": side(1, 0.5), "peft": side(2, 1), "same_ids": 3},
            {"luthier": side(2, 1.0), "peft": side(8, 1), "same_ids": 2},
        ],
    }
    rows = generate.lines(result)
    assert [row[2] for row in rows] == ["3.00x (2.00-4.00)", "1.50x (1.00-2.00)", "6.00x (4.00-8.00)"]
    assert rows[0][1] == "75 and 31"
    assert "the same ids: 2 of 3" in generate.section([result])
    assert generate.section([]) == ""


@pytest.mark.parametrize(
    ("why_off", "said"), [("", "12 steps captured, 300 replayed"), ("it waits", "no CUDA graphs: it waits")]
)
def test_a_result_of_a_gpu_says_whether_graphs_were_on(why_off: str, said: str) -> None:
    side = {"peak_memory_gib": 1.0, "elsewhere": 0.1}
    for case in ("one_by_one", "at_once"):
        side[case] = {"seconds": 1.0, "cpu_seconds": 1.0, "tokens": 100}  # type: ignore[assignment]
    graphs = {"captured": 12, "replayed": 300, "why_off": why_off}
    ours = side | {"gpu": "a card", "graphs": graphs}
    result = {
        "shape": "tiny",
        "date": "2026-01-01T00:00",
        "commit": "abc",
        "hardware": {"cpu": "a", "cores": 2},
        "prompts": {"source": "x", "count": 3, "one_by_one": 3},
        "new_tokens": 5,
        "rounds": [{"luthier": ours, "peft": side, "same_ids": 3}],
    }
    told = generate.section([result | {"device": "cuda"}, result | {"device": "cpu"}])
    assert told.count("tiny: ") == 2  # neither hides the other
    assert told.count(said) == told.count("a card") == told.count("bf16") == told.count("fp32") == 1
