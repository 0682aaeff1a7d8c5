"""Captured steps against ordinary ones. In place of CUDA's recorder is one that traces a pass to single operations:
what it replays has no Python, and every number and shape in it is that of the capture."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from luthier.generate import graphs
from luthier.generate.continuous import Continuous
from luthier.generate.engine import Engine
from luthier.generate.rows import Row
from luthier.generate.sampling import Sampling
from luthier.generate.slots import Slots
from luthier.models import attention
from luthier.models.several import open_several
from tests.generate.test_continuous import alone, ours, passes, some_prompts
from tests.models.toy_folders import adapter_folder, base_folder


class Traced:
    """A recorder of torch's operations on the real tensors, in place."""

    def __init__(self, device: torch.device) -> None:
        pass

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return make_fx(run)()


@pytest.fixture(autouse=True)
def _captured_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured as on a GPU, the second time that they come up, and with few keys."""
    attention.register()
    monkeypatch.setattr(graphs, "recorder_for", lambda device: Traced)
    monkeypatch.setattr(graphs, "CAPTURE_AT", 2)
    monkeypatch.setattr(graphs, "LEAST_KEYS", 16)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[graphs._Kind]:
    """Of all captures."""
    found: list[graphs._Kind] = []
    capture = graphs.Graphs._capture

    def watched(self: graphs.Graphs, kind: graphs._Kind, *rest: Any) -> None:
        found.append(kind)
        capture(self, kind, *rest)

    monkeypatch.setattr(graphs.Graphs, "_capture", watched)
    return found


def rows_of(model: Any, lengths: tuple[int, ...], limits: tuple[int, ...], **changes: Any) -> list[Row]:
    engine = Engine(model, None, [])
    return [
        row
        for prompt, limit in zip(some_prompts(lengths), limits, strict=True)
        for row in engine.rows([prompt], Sampling(max_new_tokens=limit, **({"do_sample": False} | changes)))
    ]


def run(loop: Any, rows: list[Row] = []) -> None:  # noqa: B006 -- never written to
    loop.submit(rows)
    while loop.step():
        pass


def right(model: Any, rows: list[Row]) -> bool:
    return [row.token_ids for row in rows] == [alone(model, row.prompt_ids, row.limit) for row in rows]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_texts_join_and_end(family: str, kinds: list[graphs._Kind]) -> None:
    """Windows, sinks, soft caps, experts and learned positions; the numbers of rows and keys change on the way."""
    model = ours(family)
    rows = rows_of(model, (5, 9, 3, 21, 6), (14, 8, 33, 9, 18))
    loop = Engine(model, None, []).loop()
    loop.submit(rows[:3])
    for _ in range(5):
        loop.step()
    run(loop, rows[3:])
    assert right(model, rows)
    state = graphs.state_of(model)
    assert not state.why_off
    assert len(kinds) - 2 <= state.captured <= len(kinds)  # some are dropped before their step comes up again
    assert state.replayed > 10
    assert {kind.rows for kind in kinds} >= {1, 2, 4}
    assert len({kind.keys for kind in kinds}) >= 2


def test_what_has_moved_is_captured_anew(kinds: list[graphs._Kind]) -> None:
    """A second text joins for a moment, and needs a slot."""
    model = ours("llama")
    rows = rows_of(model, (3, 4), (20, 2))
    loop = Continuous(model, max_cached_tokens=4096)
    loop.submit(rows[:1])
    for _ in range(6):
        loop.step()
    before = graphs.state_of(model).replayed
    run(loop, rows[1:])
    assert right(model, rows)
    assert kinds[:2] == [graphs._Kind(1, 16, ())] * 2
    assert 0 < before < graphs.state_of(model).replayed


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_texts_that_make_room_and_come_back(family: str) -> None:
    model = ours(family)
    rows = rows_of(model, (5, 17, 3, 40, 40, 11), (20,) * 6)
    run(Continuous(model, max_cached_tokens=200), rows)
    assert right(model, rows)
    assert graphs.state_of(model).replayed and not graphs.state_of(model).why_off


def test_more_kinds_of_steps_than_are_kept(monkeypatch: pytest.MonkeyPatch, kinds: list[graphs._Kind]) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    model = ours("llama")
    rows = rows_of(model, (5, 9, 4), (6, 12, 50))
    loop = Continuous(model, max_cached_tokens=4096)
    run(loop, rows)
    assert loop.graphs is not None and len(loop.graphs._steps) == 1 < len(set(kinds))
    assert right(model, rows)


def test_what_ended_texts_leave_behind_is_not_written_over() -> None:
    """Of four texts one ends. The row that fills the others' steps up is in its slot, and its next turn finds it."""
    model = ours("llama")
    rows = rows_of(model, (14, 12, 9, 8), (20, 20, 20, 3))
    loop = Continuous(model, max_cached_tokens=4096)
    loop.submit(rows)
    for _ in range(10):
        loop.step()
    assert graphs.state_of(model).replayed and len(loop.running) == 3
    [next_turn] = Engine(model, None, []).rows([[*rows[3].ids, 7, 8, 9]], Sampling(max_new_tokens=5, do_sample=False))
    with passes(model) as seen:
        run(loop, [next_turn])
    assert seen[0] == (1, 1, 1, 4)  # of the new turn the answer's last token and three new ones
    assert right(model, [*rows, next_turn])


def test_a_spare_row_needs_a_place() -> None:
    slots = Slots(torch.device("cpu"))
    slots.resize(3, 5)
    slots.lengths = [2, 5, 0]
    assert slots.spare(range(1, 3)) == [4, 0]
    assert slots.lengths == [2, 4, 0]  # the full one has given its last token away


def test_a_spare_row_beyond_the_keys_sees_one() -> None:
    """A row that sees none is nan with some kernels, and what it writes would stay."""
    slots = Slots(torch.device("cpu"))
    slots.resize(3, 90)
    slots.begin_fixed(torch.tensor([3, 15, 89]), 16)
    for window, seen in ((None, [4, 16, 16]), (6, [4, 6, 6])):
        mask = slots._mask(window, 16)
        assert mask is not None and mask.sum(-1).flatten().tolist() == seen


def test_several_adapters(tmp_path: Path, toy_tokenizer: Any, kinds: list[graphs._Kind]) -> None:
    """Who speaks changes as texts end; one capture serves whoever has which row."""
    base = base_folder(tmp_path / "base", "llama", toy_tokenizer)
    settings: tuple[dict[str, Any], ...] = (
        dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"]),
        dict(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj", "up_proj", "lm_head"]),
    )
    paths = [adapter_folder(tmp_path / f"run-{n}", base, n, **each) for n, each in enumerate(settings)]
    several = open_several([str(path) for path in (*paths, base)])

    def answered(captured: bool) -> list[list[int]]:
        limits = (30, 9, 14, 34, 12, 20, 9)
        rows = rows_of(several.model, (9, 4, 12, 7, 5, 6, 8), limits)
        for row, name in zip(rows, ("run-0", "base", "run-1", "run-0", "run-1", "run-0", "base"), strict=True):
            row.adapter = several.adapter_of(name)
        loop = several.loop(Engine(several.model, several.tokenizer, []))
        assert isinstance(loop, Continuous)
        if not captured:
            loop.graphs = None
        loop.submit(rows[:4])
        for _ in range(5):
            loop.step()
        run(loop, rows[4:])
        return [row.token_ids for row in rows]

    assert answered(True) == answered(False)
    state = graphs.state_of(several.model)
    assert not state.why_off and state.replayed > 10
    assert {kind.adapters for kind in kinds} >= {("run-0",), ("run-0", "run-1")}


@pytest.mark.parametrize(
    "changes", [{"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.3}]
)
def test_tokens_are_chosen_outside_of_what_is_captured(changes: dict[str, Any]) -> None:
    model = ours("qwen3")
    found = []
    for captured in (True, False):
        rows = rows_of(model, (5, 17, 3), (20, 12, 20), **changes)
        loop = Continuous(model, max_cached_tokens=4096)
        if not captured:
            loop.graphs = None
        run(loop, rows)
        found.append([row.token_ids for row in rows])
    assert found[0] == found[1]
    assert graphs.state_of(model).replayed


def test_log_probs_in_place_of_a_token() -> None:
    """A text whose next token's log-probs are wanted goes on in a step with others."""
    model = ours("llama")
    loop = Continuous(model, max_cached_tokens=4096)
    rows = rows_of(model, (6, 6), (30, 30))
    loop.submit(rows)
    for _ in range(10):
        loop.step()
    rows[0].scores_of = range(128)
    loop.step()
    expected = model(torch.tensor([rows[0].ids])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor(rows[0].logps), expected, rtol=1e-4, atol=1e-4)
    assert graphs.state_of(model).replayed


# --- what does not hold is not used -----------------------------------------------------------------------------------


class Still(Traced):
    """Replays nothing."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return lambda: None


class Failing(Traced):
    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("recorder", "why"), [(Still, "differ from the ordinary"), (Failing, "RuntimeError: CUDA error: operation not")]
)
def test_a_capture_that_is_wrong_or_fails(
    recorder: type[Traced],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kinds: list[graphs._Kind],
) -> None:
    monkeypatch.setattr(graphs, "recorder_for", lambda device: recorder)
    model = ours("llama")
    with caplog.at_level(logging.INFO, "luthier"):
        for _ in range(2):
            rows = rows_of(model, (5, 17, 3), (20, 12, 20))
            run(Continuous(model, max_cached_tokens=4096), rows)
            assert right(model, rows)
    assert why in graphs.state_of(model).why_off
    assert len(kinds) == 1 and graphs.state_of(model).replayed == 0
    assert [why in line for line in caplog.messages] == [True]


def test_a_pass_whose_python_reads_the_device() -> None:
    """As of a family that asks a tensor which way to go."""
    model = ours("llama")
    rows = rows_of(model, (5, 4), (12, 12))
    asking = model.model.layers[0].register_forward_hook(lambda module, args, out: bool(out.sum() > 1e9) or None)
    try:
        run(Continuous(model, max_cached_tokens=4096), rows)
    finally:
        asking.remove()
    assert graphs.state_of(model).why_off
    assert right(model, rows)


def test_a_mask_that_stays_as_it_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is of a later step than the capture: one that knows its own lengths only is found out."""
    model = ours("llama")
    mask = Slots._mask

    class Numbers(Traced):
        """Runs Python, but with the lengths of the capture."""

        def capture(self, run: Callable[[], None]) -> Callable[[], None]:
            first: list[Any] = []

            def once(slots: Slots, window: int | None, longest: int) -> Any:
                assert slots._pass is not None
                if slots._pass.longest is None:
                    return mask(slots, window, longest)
                if not first:
                    first.append(mask(slots, window, longest))
                return first[0]

            monkeypatch.setattr(Slots, "_mask", once)
            run()
            return run

    monkeypatch.setattr(graphs, "recorder_for", lambda device: Numbers)
    rows = rows_of(model, (5, 17, 3), (20, 12, 20))
    run(Continuous(model, max_cached_tokens=4096), rows)
    assert "differ" in graphs.state_of(model).why_off
    assert right(model, rows)


# --- where and for how long -------------------------------------------------------------------------------------------


def test_only_a_gpu_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert graphs.recorder_for(torch.device("cuda")) is graphs.CudaRecorder
    assert graphs.recorder_for(torch.device("cpu")) is None
    assert Continuous(ours("llama"), max_cached_tokens=4096).graphs is None


def test_memory_is_given_back() -> None:
    """By `clear`, and with the loop itself: nothing that it holds may hold it."""
    model = ours("llama")
    loop = Continuous(model, max_cached_tokens=4096)
    rows = rows_of(model, (5, 4), (12, 12))
    run(loop, rows)
    assert loop.graphs is not None and loop.graphs._steps
    loop.clear()
    assert not loop.graphs._steps and not loop.graphs._logits and loop.graphs._recorder is None
    run(loop, again := rows_of(model, (5, 4), (12, 12)))
    assert right(model, again)
    gone = weakref.ref(loop)
    gc.disable()
    try:
        del loop
        assert gone() is None
    finally:
        gc.enable()


def test_waiting_for_the_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert graphs._waits(lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1))
    assert not graphs._waits(lambda: warnings.warn("something else", stacklevel=1))
    assert modes == ["warn", 0, "warn", 0]
