"""The training loop: one for every method.

`fit` takes its parts as arguments and knows none of them: a policy (flat batch -> log-probs), an objective
(policy and batch -> partial loss), steps cut into passes, an engine that brings gradients together and takes the step,
evaluators.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from luthier.errors import RunError
from luthier.train.checkpoint import Checkpoints, State, Window, latest
from luthier.train.metrics import Recorder, count_step, note_evaluation, training_row
from luthier.train.protocols import Engine, Loader, Objective, Step


class OutOfMemory(RunError):
    """A pass that memory does not hold. In a single process, one of several documents is a reason to go on with
    smaller passes (`_own_gradients`); this ends the run where that cannot help, and where there are several
    processes, which have to agree on their passes.

    Args:
        budget: most tokens in a pass so far. where: which process, if there are several.
    """

    def __init__(self, step: int, documents: int, tokens: int, budget: int, where: str = "") -> None:
        self.documents, self.tokens, self.smaller = documents, tokens, min(budget, tokens) // 2
        cure = (
            "it is one document, so that no cut helps; gradient_checkpointing: auto keeps less for the backward pass "
            "and offload (on a GPU) least, a shorter sequence_len takes out what is as long, and a smaller lora_r or "
            "a 16-bit model needs less"
            if documents == 1
            else f"with --resume_from_checkpoint auto the same command goes on in passes of up to {self.smaller} tokens"
        )
        super().__init__(f"out of memory at step {step}{where} in a pass of {tokens} tokens: {cure}")


# Devices that have computed a figure before they hand it over: looking at it there costs nothing.
READ_AT_ONCE = {"cpu"}


@dataclass(frozen=True)
class Unread:
    """Figures of a step that are still on the device: loss, the objective's sums, and the gradients' norm."""

    number: int
    step: Step
    loss: torch.Tensor
    sums: torch.Tensor
    norm: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """When things happen: steps in all, and after which steps to log, evaluate and save."""

    total_steps: int
    log: Callable[[int], bool]
    evaluate: Callable[[int], bool]
    save: Callable[[int], bool]
    save_best: bool = False
    patience: int | None = None


def fit(
    engine: Engine,
    objective: Objective,
    loader: Loader,
    *,
    learning_rate: Callable[[int], float],
    plan: Plan,
    state: State,
    recorder: Recorder,
    checkpoints: Checkpoints,
    evaluate: Callable[[int], dict[str, float]] | None,
    sample: Callable[[int], list[dict[str, Any]]] | None,
    interrupted: Callable[[], bool],
    device: torch.device,
    peak_memory: Callable[[], float],
    keep_less: Callable[[], str] | None = None,
) -> tuple[State, bool]:
    """Train from `state.step` to the plan's end, an interruption, or early stopping.

    Args:
        learning_rate: of a step, counted from 0.
        evaluate: step -> row of figures, `eval_loss` among them. sample: step -> generated samples.
        interrupted: asked in every step; true in any process ends the run after that step and a checkpoint.
        keep_less: where a single document is too long for memory: makes the policy keep less for backward, and says
            what it did; empty if there is no more to do.

    Returns:
        The state reached, and whether it was an interruption that ended it.

    Raises:
        RunError: the loss is not finite, or a checkpoint cannot be written; with several processes, memory ran out.
    """
    own_gradients = partial(
        _own_gradients,
        engine,
        objective,
        loader,
        state=state,
        recorder=recorder,
        device=device,
        keep_less=keep_less,
    )
    unread: list[Unread] = []
    stopping = False
    while state.step < plan.total_steps and not _patience_is_over(state, plan):
        began = time.perf_counter()
        rate = learning_rate(state.step)
        engine.set_rate(rate)

        # 1. Forward and backward of the whole step, in passes that memory holds; each process computes its share,
        #    and gradients, loss and sums are added up.
        step, loss, sums, computed, stopping = _gradients(
            own_gradients, objective.sums, engine, loader, state.step + 1, interrupted, device
        )

        # 2. Clip, step, and bring the result into the model.
        norm, said = engine.step()
        if said:
            recorder.say(f"step {state.step + 1} {said}")

        # 3. Account for it. What the device has computed stays there until somebody looks, since looking waits
        #    for it; nothing is logged or saved unseen.
        state.step += 1
        state.documents += len(step.rows)
        state.tokens += step.tokens
        state.computed_tokens += computed
        state.trained_tokens += step.trained_tokens
        state.loss_scale = engine.scaler.state_dict()
        state.stream = loader.standing(state.step)
        unread.append(Unread(state.step, step, loss, sums, norm))
        last = state.step == plan.total_steps
        logs, saves = plan.log(state.step) or last, plan.save(state.step) or last or stopping
        if logs or saves or plan.evaluate(state.step) or device.type in READ_AT_ONCE:
            last_norm = _read(unread, state, loader, checkpoints, overflow_is_ordinary=engine.scaler.is_enabled())
        count_step(state, step.trained_tokens, step.tokens, time.perf_counter() - began)
        recorder.advance(state.step)

        # 4. Log, evaluate, save. The weights that are looked at need not be those that gradients are taken at.
        if logs:
            figures = objective.figures(state.window.sums) | loader.figures()
            epoch = loader.epochs_before(state.step)
            recorder.row(
                training_row(state, plan.total_steps, epoch, figures, rate, last_norm, peak_memory())
            )
            state.window = Window()
        improved = False
        with engine.looked_at() if saves or plan.evaluate(state.step) else nullcontext():
            if plan.evaluate(state.step):
                if evaluate:
                    improved = note_evaluation(state, evaluate(state.step), recorder)
                if sample:
                    recorder.samples(sample(state.step))
                stopping = stopping or any(any(words) for words in engine.processes.gather([interrupted()]))
            if saves or stopping or (improved and plan.save_best):
                checkpoints.save(state, engine.collect)

        # 5. End early: asked to, or no longer improving.
        if stopping:
            break
        if why := _patience_is_over(state, plan) or recorder.ended():
            with engine.looked_at():
                checkpoints.save(state, engine.collect)
            recorder.say(f"stopping early: {why}")
            break
    checkpoints.settle()
    return state, stopping


def _gradients(
    own_gradients: Callable[[], tuple[Step, torch.Tensor, torch.Tensor, int]],
    n_sums: int,
    engine: Engine,
    loader: Loader,
    number: int,
    stopping: Callable[[], bool],
    device: torch.device,
) -> tuple[Step, torch.Tensor, torch.Tensor, int, bool]:
    """The gradients of the next step, of all processes, in the masters; returns the step, its loss and sums, both on
    the device, the tokens that were computed, and whether a process was asked to stop.

    Args:
        own_gradients: `_own_gradients` of this process. n_sums: how many sums it returns. number: of the step, from 1.

    Raises:
        OutOfMemory: on all processes, if one of them had too little.
    """
    step, loss, sums = None, torch.zeros((), device=device), torch.zeros(n_sums, device=device)
    computed = tokens = documents = 0
    try:
        step, loss, sums, computed = own_gradients()
    except OutOfMemory as error:
        if engine.processes.size == 1:
            raise
        tokens, documents = error.tokens, error.documents
        if engine.lockstep:  # the others wait in the middle of a pass, and cannot be told
            where = f" on rank {engine.processes.rank}"
            raise OutOfMemory(number, documents, tokens, loader.tokens_per_pass, where) from error
    said = engine.add_up(
        [loss, sums],
        [stopping(), computed, documents, tokens],
        failed=documents > 0,
    )
    # A single document has no way out, so that it goes before others; then the smallest pass decides.
    failures = [(words[2] > 1, words[3], rank) for rank, words in enumerate(said) if words[2]]
    if failures or step is None:
        _, _, rank = min(failures)
        documents, tokens = map(int, said[rank][2:])
        raise OutOfMemory(number, documents, tokens, loader.tokens_per_pass, f" on rank {rank}")
    return step, loss, sums, sum(int(words[1]) for words in said), any(words[0] for words in said)


def _own_gradients(
    engine: Engine,
    objective: Objective,
    loader: Loader,
    *,
    state: State,
    recorder: Recorder,
    device: torch.device,
    keep_less: Callable[[], str] | None,
) -> tuple[Step, torch.Tensor, torch.Tensor, int]:
    """The gradients of this process's share of the next step, in the masters; returns the step, its share of the loss
    and the sums, both on the device, and the tokens that were computed.

    Out of memory, the step is cut anew into passes half as large and repeated from its first, and so are the
    steps after it, here and in a run that resumes; not where there are several processes. A single document cannot
    be cut, and more is recomputed instead.
    """
    several = engine.processes.size > 1
    while True:
        # The whole step is known first, so that every pass has the step's denominator.
        step: Step = loader.step(state.step)
        engine.policy.train()
        engine.zero_grad()
        try:
            return step, *_run_passes(engine, objective, loader, step, state.step + 1, device)
        except OutOfMemory as error:
            if engine.stepped_by_backward:  # some weights have taken their step already
                raise RunError(
                    f"out of memory at step {state.step + 1}, one pass of {error.tokens} tokens as "
                    "optimizer_in_backward needs it: a smaller micro_batch_size or sequence_len needs less, "
                    "or gradient_checkpointing: true"
                ) from error
            alone = error.documents == 1
            done = keep_less() if alone and keep_less is not None and not engine.lockstep else ""
            if not done and (alone or several):
                raise
            before, smaller = loader.tokens_per_pass, error.smaller
        # Outside of the except block: while there is a traceback, its frames hold the pass's activations.
        engine.zero_grad()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if alone:
            recorder.say(f"out of memory at step {state.step + 1} in one document: going on with {done}")
            continue
        loader.tokens_per_pass = state.tokens_per_pass = smaller
        recorder.say(
            f"out of memory at step {state.step + 1} with passes of up to {before} tokens: going on with {smaller}"
        )


def _run_passes(
    engine: Engine,
    objective: Objective,
    loader: Loader,
    step: Step,
    number: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Forward and backward, pass by pass; the partial losses add up to the step's loss."""

    def guarded(batch: Any, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            error.__traceback__ = None
            raise OutOfMemory(number, len(batch.rows), len(batch.input_ids), loader.tokens_per_pass) from error

    def forward_and_backward(batch: Any, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        share, sums = objective(engine.policy, batch, step)
        engine.backward(share * 0 if batch.spare else share, last=last)
        return share.detach(), sums

    loss, sums, computed = torch.zeros((), device=device), torch.zeros(objective.sums, device=device), 0
    objective.begin(engine.policy, loader.mismatched(step, device), step, guarded)
    for batch, last in _with_last(loader.batches(step, device)):
        of_pass = guarded(batch, partial(forward_and_backward, batch, last))
        if batch.spare:
            continue
        loss, sums = loss + of_pass[0], sums + of_pass[1]
        computed += len(batch.input_ids)
    return loss, sums, computed


def _with_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each with whether it is the last."""
    before = None
    for batch in batches:
        if before is not None:
            yield before, False
        before = batch
    if before is not None:
        yield before, True


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU's allocator and MPS have words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "MPS backend out of memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


def _patience_is_over(state: State, plan: Plan) -> str:
    if plan.patience is None or state.evaluations_since_best < plan.patience:
        return ""
    return (
        f"eval loss has not improved in {plan.patience} evaluations "
        f"(best {state.best_loss:.4f} at step {state.best_step})"
    )


def _read(
    unread: list[Unread],
    state: State,
    loader: Loader,
    checkpoints: Checkpoints,
    *,
    overflow_is_ordinary: bool,
) -> float:
    """Read the figures of steps, in order, into the windows; returns the last gradient norm.

    Raises:
        RunError: a loss is not finite, or a gradient, unless that is `overflow_is_ordinary`.
    """
    losses, sums, norms = (
        torch.stack(column).tolist()
        for column in ([u.loss for u in unread], [u.sums for u in unread], [u.norm for u in unread])
    )
    for each, loss, of_step, norm in zip(unread, losses, sums, norms, strict=True):
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow_is_ordinary):
            what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
            raise RunError(_not_finite(what, each.number, loader.locations(each.step), checkpoints))
        for window in (state.window, state.between):
            window.loss += loss
            window.sums = [a + b for a, b in zip(window.sums or [0.0] * len(of_step), of_step, strict=True)]
    unread.clear()
    return float(norms[-1])


def _not_finite(what: str, step: int, rows: list[str], checkpoints: Checkpoints) -> str:
    kept = latest(checkpoints.folder)
    return (
        f"{what} at step {step}, and nothing from that step on was saved. Its rows: "
        f"{', '.join(rows[:16])}{f' and {len(rows) - 16} more' if len(rows) > 16 else ''}. "
        + (f"The last good checkpoint is {kept}. " if kept else "No checkpoint was written before it. ")
        + "Try a lower learning_rate, more warmup_steps, or bf16 instead of fp16."
    )
