"""From a config to a finished run folder: the one place that puts the parts together.

config -> device, tokenizer, data -> model -> policy (proven) -> optimizer, steps -> fit -> folder
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch

from luthier.artifacts.source import described, pinned
from luthier.config import Config
from luthier.config.artifact_names import named_in
from luthier.data.mixed import mix_figures, mix_report
from luthier.data.stream.prepare import prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import DataError, RunError
from luthier.models.assemble import build_model, with_adapter_settings
from luthier.models.device import (
    choose_device,
    choose_dtype,
    keep_freed_memory,
    peak_memory_gib,
    set_matmul_precision,
)
from luthier.models.fp8 import check_fp8, round_to_fp8
from luthier.models.fuse import fuse_policy
from luthier.models.isolation import build_policy
from luthier.models.layers import recomputation_of
from luthier.models.load import count_parameters, read_model_config
from luthier.models.quantize import check_trains, quantization
from luthier.models.rank_budget import looks_at_data
from luthier.models.rope import check_length, with_positions
from luthier.objectives.sft import SFT
from luthier.plan.measured import PeakWatch
from luthier.train.artifacts import write_environment
from luthier.train.checkpoint import Checkpoints, State
from luthier.train.distributed import Processes
from luthier.train.engine import Engine
from luthier.train.evaluators import evaluation, sampling
from luthier.train.files import write_text_atomic
from luthier.train.finish import RunResult, finish, keep_best, report_of_a_failure, stop
from luthier.train.folder import CONFIG, GIVEN, SUMMARY, RunFolder, shared_folder
from luthier.train.forgetting import before_training, say_not_measured
from luthier.train.given import Follower, Given
from luthier.train.interrupt import Interrupt, terminated_with_a_message
from luthier.train.intervals import build_plan
from luthier.train.loop import OutOfMemory, fit
from luthier.train.metrics import Recorder, Silent
from luthier.train.optim import schedule
from luthier.train.optimizers import check_optimizer, set_labels
from luthier.train.passes import (
    choose_tokens,
    keep_less,
    remember_smaller,
    steps_in_backward,
    take_over_smaller,
)
from luthier.train.preference_watch import PreferenceWatch
from luthier.train.preferences import PreferenceTuning, watch_of
from luthier.train.protocols import Objective
from luthier.train.resume import resume, say_changes
from luthier.train.spread import check_spread, engine_of, loading_device, show
from luthier.train.steps import first_documents, job_of, loader_of, say_steps
from luthier.train.trackers import Trackers, trackers_of
from luthier.train.uploads import Uploads
from luthier.train.weights import write_model

log = logging.getLogger("luthier")

__all__ = ["GIVEN", "Follower", "Given", "RunResult", "train"]


def train(config: Config, given: Given | None = None) -> RunResult:
    """Run a config to its end, or go on with its run; everything it makes is in its `output_dir`.

    Args:
        given: a model to train in place of the one that `base_model` names, and who follows the run.

    Raises:
        LuthierError: anything that the user can mend, before the first step wherever possible.
    """
    began = time.perf_counter()
    processes = Processes.of_environment()
    processes.check(config)
    if given is not None and processes.size > 1:
        raise RunError(
            f"a model that a program made is trained in one process, and there are {processes.size}: start the run "
            "with `luthier train` and its config.yaml instead"
        )
    with terminated_with_a_message(), processes.connected():
        if any(named_in(config.flat())):
            config = processes.in_turn(partial(pinned, config))
        config = with_adapter_settings(config)
        with (
            shared_folder(config, processes) as opened,
            trackers_of(config, opened.path, processes) as trackers,
            processes.lost_ones_named(),
        ):
            return _train(config, opened, trackers, processes, began, given)


def _train(
    config: Config,
    opened: RunFolder,
    trackers: Trackers,
    processes: Processes,
    began: float,
    given: Given | None,
) -> RunResult:
    folder = opened.path
    # 1. Where and in which precision, and the data.
    device = processes.take_device(choose_device(config.model.device_map))
    dtype = choose_dtype(config, device)
    if config.model.load_in_fp8:
        check_fp8(device, dtype)
    check_optimizer(config.training, device, dtype)
    model_config = read_model_config(config.model) if given is None else given.model.config
    check_spread(config, model_config, device, dtype, processes, given=given is not None)
    check_trains(config, model_config)
    quantization(config.model, model_config, device, dtype)  # for its errors: before data is prepared
    set_matmul_precision(config, device)
    keep_freed_memory(device)
    torch.manual_seed(config.training.seed)
    tokenizer = load_tokenizer(config)
    data = processes.in_turn(partial(prepare, config, tokenizer, processes.size))
    if processes.main:
        data.report.log()
    if len(data.train) < processes.size:
        raise DataError(
            f"the training data has {len(data.train)} documents, and there are {processes.size} processes: start fewer"
        )
    processes.join(device, config.distributed.ddp_timeout)
    if data.stream is not None:  # documents as long as the config allows may come
        check_length(config, model_config, config.data.sequence_len)
    config = with_positions(config, model_config, [data.train, data.validation])
    watch = PeakWatch(config, device, dtype, len(tokenizer), processes.size)

    # 2. The model, what of it is trained, and the steps.
    documents = first_documents(data.train, config) if looks_at_data(config.adapter) else None
    loaded_on = loading_device(config, device, processes)
    model, dropout = build_model(
        config,
        tokenizer,
        loaded_on,
        dtype,
        documents=documents,
        resume_from=opened.resume_from,
        given=None if given is None else given.model,
        adapter=None if given is None else given.adapter,
    )
    parameters = count_parameters(model)
    if loaded_on != device:
        show(model, device)
    policy = build_policy(model, dropout, config.data.sequence_len)
    policy.weighted_sum = config.preference.rl is None
    if config.precision.kernels == "auto":
        fuse_policy(policy)
    engine = engine_of(config, policy, device, dtype, processes)
    masters, optimizer = engine.masters, engine.optimizer
    watch.follow(policy, masters)
    share = policy.may_share() if config.training.share_prefixes == "auto" else ""
    loader = loader_of(config, data, processes, alone=not policy.flat, share=share)
    loader.lockstep = engine.lockstep
    set_labels(optimizer, loader.per_step(data.train.trained))
    total_steps = config.training.max_steps or loader.total_steps(config.training.num_epochs)
    data.report.mix = mix_report(config, data, loader.order, total_steps)
    if config.model.load_in_fp8:
        round_to_fp8(policy, next(loader.batches(loader.step(0), device)))
    say_steps(config, loader, total_steps, device, dtype, processes, data.report.mix)
    tuning = None
    if config.preference.rl is not None:
        settings = (str(dtype), device.type, config.precision.kernels, config.model.attn_implementation)
        tuning = PreferenceTuning.prepare(
            config, policy, loader, data.validation, device=device, settings=settings, processes=processes
        )
    objective: Objective = SFT() if tuning is None else tuning.objective

    # 3. Where the run stands, and what its folder says of it.
    job = job_of(config, data, masters, loader)
    processes.agree_on("data, settings or trained parameters", sha256(repr(job).encode()).hexdigest())
    if data.stream is not None:
        data.forget()
    state = State()
    if opened.resume_from is not None:
        state = resume(opened.resume_from, job, engine)
        if processes.main:
            say_changes(folder, config)
        loader.go_on(state.stream)
    engine.level(device)
    masters.publish()
    take_over_smaller(folder, state, config, processes)
    recomputation = recomputation_of(policy.model, config.precision, state.recomputed)
    budget = choose_tokens(config, state, loader, policy, masters, recomputation, device, processes)
    log.info("%s", budget)
    state.recomputed = list(recomputation.modes) if recomputation.free else []
    loader.tokens_per_pass = state.tokens_per_pass = budget.tokens
    if config.training.optimizer_in_backward:
        engine.clip = steps_in_backward(optimizer, masters, loader)
    if (saved := loader.saving()) >= 0.005:
        log.info(
            "shared prefixes: about %.0f%% of the tokens are computed with another example's", 100 * saved
        )
    state.tokens_asked = config.training.max_tokens_per_pass
    inputs = described(config)
    uploads = Uploads(config, folder, trackers, inputs)
    if processes.main:
        opened.clear()
        (folder / SUMMARY).unlink(missing_ok=True)
        write_text_atomic(folder / CONFIG, config.to_yaml())
        write_environment(
            folder,
            {
                "data": data.report.describe(),
                **({"artifacts": inputs} if inputs else {}),
                "device": str(device),
                "dtype": str(dtype)[6:],
                "processes": processes.size,
                "tokens_per_pass": budget.tokens,
                "total_steps": total_steps,
            },
        )

    write = partial(write_model, model=model, masters=masters, tokenizer=tokenizer, config=config)
    limit = config.output.save_total_limit
    follower = Follower() if given is None else given.follower
    checkpoints = Checkpoints(
        folder,
        write,
        limit=limit,
        job=job,
        writes=processes.main,
        on_saved=partial(_saved, follower, uploads),
        background=engine.lockstep,
        writers=processes if engine.each_writes else None,
    )
    evaluate = evaluation(config, data.validation, policy, loader, tuning, device, processes)
    sample = sampling(config, data.validation, model, tokenizer, engine)
    plan = build_plan(
        config, loader.steps_per_epoch, total_steps, evaluates=evaluate is not None, samples=sample is not None
    )

    watch_figures = None if tuning is None else watch_of(config, loader, data.validation, total_steps, state)

    measure_general = None
    if engine.lockstep:
        say_not_measured(config)
    elif processes.main:
        measure_general = before_training(config, tokenizer, policy, loader, total_steps, opened, state, device)

    # 4. Train, to the end or to a signal, and put the result at the top of the folder.
    with (
        Interrupt() as interrupt,
        report_of_a_failure(folder if processes.main else None),
        _recorder(folder, total_steps, state, trackers, processes, watch_figures, follower) as recorder,
        loader.running(),
        _remembered_if_out_of_memory(folder, config, engine),
        processes.lost_ones_named(),
    ):
        if state.step < total_steps:
            log.info("%.1f seconds to the first step", time.perf_counter() - began)
        follower.begins(total_steps, loader.steps_per_epoch, state.step)
        state, stopped = fit(
            engine,
            objective,
            loader,
            learning_rate=schedule(config.training, total_steps),
            plan=plan,
            state=state,
            recorder=recorder,
            checkpoints=checkpoints,
            evaluate=evaluate,
            sample=sample if processes.main or engine.lockstep else None,
            interrupted=interrupt,
            device=device,
            peak_memory=partial(peak_memory_gib, device),
            keep_less=partial(keep_less, recomputation, state, processes),
        )
        if processes.main:
            loader.say_what_was_read()
        if stopped and state.step < total_steps:
            by = interrupt.signal.name if interrupt.signal else "a signal to another process"
            recorder.say(
                f"stopped by {by} after step {state.step} of {total_steps}; saved. "
                f"Go on with the same command and --resume_from_checkpoint auto"
            )
            return stop(folder, state) if processes.main else RunResult(folder, False, state)
    if not processes.main and not engine.lockstep:
        return RunResult(folder, True, state)
    with engine.looked_at():
        kept = keep_best(config, folder, state, engine, recorder)
        weights = engine.weights()
        if not processes.main:
            return RunResult(folder, True, state)
        peak = watch.peak(recomputation.modes)
        result = finish(
            config,
            folder,
            state,
            checkpoints,
            kept,
            weights,
            recorder,
            loader.examples(),
            peak,
            measure_general,
            mix_figures(config, data, loader.order, state.step),
            parameters,
        )
        uploads.result(result.summary)
        return result


def _saved(follower: Follower, uploads: Uploads, path: Path) -> None:
    follower.saved(path)
    uploads.checkpoint(path)


@contextmanager
def _remembered_if_out_of_memory(folder: Path, config: Config, engine: Engine) -> Iterator[None]:
    try:
        yield
    except OutOfMemory as error:
        # In lockstep the process whose memory it is knows alone.
        if error.documents > 1 and (engine.processes.main or engine.lockstep):
            remember_smaller(folder, error.smaller, config)
        raise


def _recorder(
    folder: Path,
    total_steps: int,
    state: State,
    trackers: Trackers,
    processes: Processes,
    watch: PreferenceWatch | None,
    follower: Follower,
) -> Recorder:
    if not processes.main:
        return Silent()
    return Recorder(
        folder,
        total_steps,
        from_step=state.step,
        sinks=[trackers.log, follower.row],
        sample_sinks=[trackers.log_samples],
        notice=watch.notice if watch else lambda row: [],
        on_step=follower.step,
        ended=follower.ended,
    )
