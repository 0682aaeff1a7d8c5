"""The training loop: one for every method.

`fit` takes its parts as arguments and knows none of them: a policy (flat batch -> log-probs), an objective
(log-probs -> partial loss), steps cut into passes, an optimizer over fp32 masters, evaluators.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from luthier.errors import RunError
from luthier.train.checkpoint import Checkpoints, State, Window, latest
from luthier.train.metrics import Recorder


class Step(Protocol):
    """One optimizer step, fixed before its first pass; see `data.loader.Step`."""

    @property
    def rows(self) -> Sequence[int]: ...
    @property
    def passes(self) -> Sequence[Sequence[int]]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def trained_tokens(self) -> int: ...


class Loader(Protocol):
    """Steps by number, and the passes of a step on a device; see `data.loader.StepLoader`."""

    steps_per_epoch: int
    tokens_per_pass: int

    def step(self, index: int) -> Any: ...
    def batches(self, step: Any, device: torch.device) -> Iterable[Any]: ...
    def locations(self, step: Any) -> list[str]: ...


class Masters(Protocol):
    """The fp32 parameters that the optimizer steps on; see `train.optim.Masters`."""

    masters: dict[str, torch.Tensor]
    stepped_by_backward: bool

    def zero_grad(self) -> None: ...
    def publish(self) -> None: ...
    def looked_at(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]: ...


class OutOfMemory(RunError):
    """A pass that memory does not hold. In a single process, one of several documents is a reason to go on with
    smaller passes (`_gradients`); this ends the run where that cannot help."""

    def __init__(self, step: int, documents: int, tokens: int) -> None:
        self.documents, self.tokens = documents, tokens
        cure = (
            "it is one document, so that no cut helps; gradient_checkpointing: auto keeps less for the backward pass "
            "and offload (on a GPU) least, a shorter sequence_len takes out what is as long, and a smaller lora_r or "
            "a 16-bit model needs less"
            if documents == 1
            else f"go on with max_tokens_per_pass: {tokens // 2} and --resume_from_checkpoint auto"
        )
        super().__init__(f"out of memory at step {step} in a pass of {tokens} tokens: {cure}")


# (log-probs, weights, the step's total weight) -> the pass's share of the loss
Objective = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


# Devices that have computed a figure before they hand it over: looking at it there costs nothing.
READ_AT_ONCE = {"cpu"}


@dataclass(frozen=True)
class Unread:
    """Figures of a step that are still on the device: loss, labels hit, and the gradients' norm."""

    number: int
    step: Step
    loss: torch.Tensor
    correct: torch.Tensor
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
    policy: nn.Module,
    objective: Objective,
    loader: Loader,
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: Callable[[int], float],
    clip: Callable[[Any], torch.Tensor],
    scaler: torch.amp.GradScaler,
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
) -> State:
    """Train from `state.step` to the plan's end, an interruption, or early stopping; returns the state reached.

    Args:
        learning_rate: of a step, counted from 0. clip: bounds the masters' gradients and returns their norm.
        scaler: scales the loss where activations are fp16; disabled otherwise.
        evaluate: step -> row of figures, `eval_loss` among them. sample: step -> generated samples.
        interrupted: asked after every step; true ends the run after a checkpoint.
        keep_less: where a single document is too long for memory: makes the policy keep less for backward, and says
            what it did; empty if there is no more to do.

    Raises:
        RunError: the loss is not finite, or a checkpoint cannot be written.
    """
    unread: list[Unread] = []
    while state.step < plan.total_steps and not _patience_is_over(state, plan):
        began = time.perf_counter()

        rate = learning_rate(state.step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)

        # 1. Forward and backward of the whole step, in passes that memory holds.
        step, loss, correct, computed = _gradients(
            policy,
            objective,
            loader,
            masters,
            scaler=scaler,
            state=state,
            recorder=recorder,
            device=device,
            keep_less=keep_less,
        )

        # 2. Clip, step, and copy the masters into the 16-bit parameters. With fp16 an overflow is ordinary: the
        #    scaler skips that step and lowers the scale.
        scaler.unscale_(optimizer)
        norm = clip(masters)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        masters.publish()
        if scaler.get_scale() < before:
            recorder.say(
                f"step {state.step + 1} is skipped: fp16 overflowed; loss scale now {scaler.get_scale():g}"
            )

        # 3. Account for it. What the device has computed stays there until somebody looks, since looking waits
        #    for it; nothing is logged or saved unseen.
        state.step += 1
        state.documents += len(step.rows)
        state.tokens += step.tokens
        state.computed_tokens += computed
        state.trained_tokens += step.trained_tokens
        state.loss_scale = scaler.state_dict()
        unread.append(Unread(state.step, step, loss, correct, norm))
        last, stopping = state.step == plan.total_steps, interrupted()
        logs, saves = plan.log(state.step) or last, plan.save(state.step) or last or stopping
        if logs or saves or plan.evaluate(state.step) or device.type in READ_AT_ONCE:
            last_norm = _read(unread, state, loader, checkpoints, overflow_is_ordinary=scaler.is_enabled())
        _count(state, step, time.perf_counter() - began)
        recorder.advance(state.step)

        # 4. Log, evaluate, save. The weights that are looked at need not be those that gradients are taken at.
        if logs:
            recorder.row(_row(state, plan, loader, rate, last_norm, peak_memory()))
            state.window = Window()
        improved = False
        with masters.looked_at(optimizer) if saves or plan.evaluate(state.step) else nullcontext():
            if plan.evaluate(state.step):
                if evaluate:
                    improved = _note_evaluation(state, evaluate(state.step), recorder)
                if sample:
                    recorder.samples(sample(state.step))
                stopping = stopping or interrupted()
            if saves or stopping or (improved and plan.save_best):
                checkpoints.save(state, masters.masters, optimizer)

        # 5. End early: asked to, or no longer improving.
        if stopping:
            break
        if _patience_is_over(state, plan):
            with masters.looked_at(optimizer):
                checkpoints.save(state, masters.masters, optimizer)
            recorder.say(
                f"stopping early: eval loss has not improved in {plan.patience} evaluations "
                f"(best {state.best_loss:.4f} at step {state.best_step})"
            )
            break
    return state


def _gradients(
    policy: nn.Module,
    objective: Objective,
    loader: Loader,
    masters: Masters,
    *,
    scaler: torch.amp.GradScaler,
    state: State,
    recorder: Recorder,
    device: torch.device,
    keep_less: Callable[[], str] | None,
) -> tuple[Step, torch.Tensor, torch.Tensor, int]:
    """The gradients of the next step, in the masters; returns the step, its loss and its hits, both on the
    device, and the tokens that were computed.

    Out of memory, the step is cut anew into passes half as large and repeated from its first, and so are the
    steps after it, here and in a run that resumes. A single document cannot be cut, and more is recomputed instead.
    """
    while True:
        # The whole step is known first, so that every pass has the step's denominator.
        step: Step = loader.step(state.step)
        policy.train()
        masters.zero_grad()
        try:
            return step, *_run_passes(policy, objective, loader, step, scaler, state.step + 1, device)
        except OutOfMemory as error:
            if masters.stepped_by_backward:  # some weights have taken their step already
                raise RunError(
                    f"out of memory at step {state.step + 1}, one pass of {error.tokens} tokens as "
                    "optimizer_in_backward needs it: a smaller micro_batch_size or sequence_len needs less, "
                    "or gradient_checkpointing: true"
                ) from error
            alone = error.documents == 1
            done = keep_less() if alone and keep_less is not None else ""
            if alone and not done:
                raise
            before, smaller = loader.tokens_per_pass, min(loader.tokens_per_pass, error.tokens) // 2
        # Outside of the except block: while there is a traceback, its frames hold the pass's activations.
        masters.zero_grad()
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
    policy: nn.Module,
    objective: Objective,
    loader: Loader,
    step: Step,
    scaler: torch.amp.GradScaler,
    number: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Forward and backward, pass by pass; the partial losses add up to the step's loss."""
    loss, correct, computed = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for documents, batch in zip(step.passes, loader.batches(step, device), strict=True):
        try:
            logps, hits = policy(batch)
            partial = objective(logps, batch.weight_N, float(max(1, step.trained_tokens)))
            scaler.scale(partial).backward()
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            error.__traceback__ = None
            raise OutOfMemory(number, len(documents), len(batch.input_ids)) from error
        loss += partial.detach()
        correct += (hits * batch.weight_N).sum()
        computed += len(batch.input_ids)
    return loss, correct, computed


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU's allocator and MPS have words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "MPS backend out of memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


def _patience_is_over(state: State, plan: Plan) -> bool:
    return plan.patience is not None and state.evaluations_since_best >= plan.patience


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
    losses, hits, norms = (
        torch.stack(column).tolist()
        for column in ([u.loss for u in unread], [u.correct for u in unread], [u.norm for u in unread])
    )
    for each, loss, correct, norm in zip(unread, losses, hits, norms, strict=True):
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow_is_ordinary):
            what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
            raise RunError(_not_finite(what, each.number, loader.locations(each.step), checkpoints))
        for window in (state.window, state.between):
            window.loss += loss
            window.correct += int(correct)
    unread.clear()
    return float(norms[-1])


def _count(state: State, step: Step, seconds: float) -> None:
    state.seconds += seconds
    for window in (state.window, state.between):
        window.steps += 1
        window.trained_tokens += step.trained_tokens
        window.tokens += step.tokens
        window.seconds += seconds


def _row(state: State, plan: Plan, loader: Loader, rate: float, norm: float, peak: float) -> dict[str, Any]:
    window = state.window
    per_step = state.seconds / state.step
    return {
        "step": state.step,
        "epoch": state.step / loader.steps_per_epoch,
        "loss": window.loss / window.steps,
        "token_accuracy": window.correct / max(1, window.trained_tokens),
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": state.tokens,
        "computed_tokens": state.computed_tokens,
        "trained_tokens": state.trained_tokens,
        "tokens_per_second": window.tokens / window.seconds,
        "seconds": state.seconds,
        "peak_memory_gib": peak,
        "eta_seconds": per_step * (plan.total_steps - state.step),
    }


def _note_evaluation(state: State, figures: dict[str, float], recorder: Recorder) -> bool:
    """Record an evaluation; says when eval loss has turned while train loss goes on falling."""
    recorder.evaluation({"step": state.step, **figures})
    loss = figures["eval_loss"]
    train_loss = state.between.loss / state.between.steps
    state.between = Window()
    improved = state.best_loss is None or loss < state.best_loss
    if improved:
        state.best_loss, state.best_step, state.evaluations_since_best = loss, state.step, 0
    else:
        state.evaluations_since_best += 1
    state.evaluations.append([state.step, loss, train_loss])
    if (since := overfitting_since(state)) is not None:
        recorder.say(f"overfitting since step {since}: eval loss rose to {loss:.4f} while train loss fell")
    return improved


def overfitting_since(state: State) -> int | None:
    """The step of the best evaluation, if eval loss has risen since while train loss fell; else None."""
    if not state.evaluations or state.evaluations[-1][0] == state.best_step:
        return None
    best = next(row for row in state.evaluations if row[0] == state.best_step)
    last = state.evaluations[-1]
    return best[0] if last[1] > best[1] and last[2] < best[2] else None


def _not_finite(what: str, step: int, rows: list[str], checkpoints: Checkpoints) -> str:
    kept = latest(checkpoints.folder)
    return (
        f"{what} at step {step}, and nothing from that step on was saved. Its rows: "
        f"{', '.join(rows[:16])}{f' and {len(rows) - 16} more' if len(rows) > 16 else ''}. "
        + (f"The last good checkpoint is {kept}. " if kept else "No checkpoint was written before it. ")
        + "Try a lower learning_rate, more warmup_steps, or bf16 instead of fp16."
    )
