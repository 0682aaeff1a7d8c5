"""`luthier plan CONFIG`: what a run will need, before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.config import Config
from luthier.config.arguments import ConfigArgument, OverridesArgument
from luthier.config.convert.command import config_of
from luthier.config.preference import unit_of
from luthier.errors import ConfigError, LuthierError

if TYPE_CHECKING:
    from luthier.plan.cards import Card
    from luthier.plan.links import Links
    from luthier.plan.plan import Plan
    from luthier.plan.strategies import Scaling
    from luthier.plan.work import Work


def command(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[str | None, typer.Option(help="A card by name, such as h100, a100-40, rtx4090, t4.")] = None,
    memory: Annotated[str | None, typer.Option(help="A card by its memory, such as 24GiB.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the data; it is then not read.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Documents of the data; it is then not read.")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(min=0.001, help="Speed of training.")] = None,
    measured: Annotated[Path | None, typer.Option(help="A run's folder, whose speed is taken.")] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of the card's multiply peak that training reaches.")
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of the card, for the cost.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Say what the given cards can train, instead.")] = False,
    num_gpus: Annotated[int | None, typer.Option(min=1, help="How many cards share the run; also with --fit.")] = None,
    interconnect: Annotated[
        str | None,
        typer.Option(help="What joins them: nvlink, pcie4, ..., 450GB/s; between machines too: nvlink,infiniband."),
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="How many of --num-gpus are in one machine; default: all.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="With --fit: models to try, such as llama-3, qwen3.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a run will need: memory, steps, time, cost; without weights and without a GPU."""
    loaded = config_of(config, overrides or [])
    card = _card(gpu, memory)
    _check_stated(loaded, tokens, rows)
    if fit:
        for name, unread in (
            ("--tokens", tokens),
            ("--rows", rows),
            ("--tokens-per-second", tokens_per_second),
            ("--measured", measured),
            ("--mfu", mfu),
            ("--price-per-hour", price_per_hour),
            ("--interconnect", interconnect),
            ("--gpus-per-node", gpus_per_node),
        ):
            if unread is not None:
                raise ConfigError(f"{name} does nothing with --fit, which says what fits and not how long it takes")
        print(_fit(loaded, card, num_gpus or 1, family, as_json=as_json))
        return
    if family is not None:
        raise ConfigError("--family goes with --fit, which says what given cards can train")
    gpus = num_gpus or 1
    for name, value in (("--interconnect", interconnect), ("--gpus-per-node", gpus_per_node)):
        if value is not None and gpus == 1:
            raise ConfigError(f"{name} is about several GPUs: say with --num-gpus how many there are")
    links = _links(loaded, card, gpus, interconnect, gpus_per_node)
    stated = {"--tokens-per-second": tokens_per_second, "--measured": measured, "--mfu": mfu}
    if len(given := [name for name, value in stated.items() if value is not None]) > 1:
        raise ConfigError(f"{' and '.join(given)} say the same in two ways; keep one")
    if mfu is not None and (card is None or card.tflops is None):
        raise ConfigError("--mfu is a share of a card's multiply peak: name the card with --gpu")
    plan = plan_of(loaded, card, tokens=tokens, rows=rows, gpus=gpus)
    speed = _speed(plan, tokens_per_second, measured, mfu)
    scaling = _scaling(loaded, plan, speed, links, gpus) if links is not None else None
    speed = _cost(plan, speed, price_per_hour, scaling)

    from luthier.plan import text

    print(json.dumps(text.as_json(plan, speed, scaling), indent=2) if as_json else text.as_text(plan, speed, scaling))


def _check_stated(config: Config, tokens: int | None, rows: int | None) -> None:
    if tokens is None or rows is None:
        return
    limit = config.data.sequence_len
    pairs = unit_of(config.preference.rl) == "pairs"
    if not rows <= tokens <= rows * limit * (2 if pairs else 1):
        each = "either answer of a pair with its prompt" if pairs else "a document"
        raise ConfigError(
            f"--tokens {tokens:,} in --rows {rows:,}: {each} has at least one token and at most sequence_len "
            f"({limit:,}); correct one of the three"
        )


def plan_of(
    config: Config, card: Card | None, *, tokens: int | None = None, rows: int | None = None, gpus: int = 1
) -> Plan:
    """The plan of a config.

    Args:
        tokens, rows: of one epoch, where the data is not to be read. gpus: how many share the run; the plan's memory is
            that of one of them.

    Raises:
        ModelError: no config.json, or a model that cannot be planned for.
        ConfigError, DataError: as training would raise them.
    """
    # Imported here, so that a mistake on the command line is said before torch is loaded.
    from luthier.models.assemble import with_adapter_settings
    from luthier.models.load import read_model_config
    from luthier.models.quantize import check_format, check_trains
    from luthier.plan.plan import make_plan
    from luthier.plan.read import engine_of, on_cpu, training_shape
    from luthier.plan.work import work_stated

    config = with_adapter_settings(config)
    model_config = read_model_config(config.model)
    check_trains(config, model_config)
    check_format(config.model, model_config)
    if config.model.load_in_fp8 and (on_cpu(config) or (card is not None and not card.fp8)):
        raise ConfigError(
            f"load_in_fp8: {'a CPU' if card is None or on_cpu(config) else card.name} has no multiply for it (Hopper, "
            "such as the h100, and later have): leave load_in_fp8 out, or take load_in_8bit or load_in_4bit"
        )
    if on_cpu(config) and card is not None and card.tflops is not None:
        raise ConfigError(
            f"--gpu {card.name}: the config computes on the CPU (device_map: cpu): leave one of the two out, or say "
            "with --memory how much the machine has"
        )
    vocabulary = 0
    if tokens is not None or rows is not None:
        named = [f"{tokens:,} tokens"] if tokens else []
        named += [f"{rows:,} {unit_of(config.preference.rl)}"] if rows else []
        assumed = f"; {_prompts_assumed(config)}" if config.preference.rl else ""
        work = work_stated(config, tokens, rows, f"{' in '.join(named)}, as stated{assumed}", gpus)
    else:
        work, vocabulary = _work(config, gpus)
    shape = training_shape(config, model_config, tokens=vocabulary)
    engine = engine_of(config, model_config, shape, card, cpu=on_cpu(config), gpus=gpus)
    return make_plan(config, model_config, shape, engine, work, card, tokens=vocabulary)


def _work(config: Config, gpus: int) -> tuple[Work, int]:
    """From the data where it is at hand, and the tokenizer's size; otherwise says what is assumed."""
    from luthier.data.tokenizer import load_tokenizer
    from luthier.plan.work import work_from_data, work_stated

    assumed = "every document is taken to be sequence_len long"
    if config.preference.rl:
        answers = "both answers" if unit_of(config.preference.rl) == "pairs" else "every answer"
        assumed = f"{answers} with the prompt taken to be sequence_len long, {_prompts_assumed(config)}"
    assumed += "; --tokens and --rows say how many there are"
    paths = [entry.path.split("#")[0] for entry in (*config.data.datasets, *config.data.test_datasets)]
    far = [path for path in paths if not Path(path).expanduser().exists() and not any(c in path for c in "*?[")]
    if far:
        return work_stated(config, None, None, f"{', '.join(far)} not on this machine, not read: {assumed}", gpus), 0
    try:
        tokenizer = load_tokenizer(config)
    except LuthierError as error:
        return work_stated(config, None, None, f"not read ({error}): {assumed}", gpus), 0
    return work_from_data(config, tokenizer, gpus), len(tokenizer)


def _prompts_assumed(config: Config) -> str:
    limit = config.preference.max_prompt_len
    return f"prompts taken to be {'half of that' if limit is None else f'{limit:,} tokens'}"


def _card(gpu: str | None, memory: str | None) -> Card | None:
    from luthier.plan.cards import Card, card_named, parse_memory

    if gpu is not None and memory is not None:
        raise ConfigError("--gpu and --memory both name a card; keep one")
    if gpu is not None:
        return card_named(gpu)
    return None if memory is None else Card("a card", parse_memory(memory))


def _fit(config: Config, card: Card | None, cards: int, family: str | None, *, as_json: bool) -> str:
    from luthier.models.load import read_model_config
    from luthier.plan import text
    from luthier.plan.families import family_of
    from luthier.plan.plan import fit_family
    from luthier.plan.read import on_cpu

    if card is None:
        raise ConfigError("--fit asks what given cards can train: name them with --gpu NAME or --memory SIZE")
    model_config = read_model_config(config.model)
    found = fit_family(config, model_config, family, card, cards, cpu=on_cpu(config))
    if as_json:
        return json.dumps(text.fit_json(found, card, cards, config.data.sequence_len), indent=2)
    name = family or family_of(model_config) or "this model alone, since no table has its family"
    asked = config.precision.gradient_checkpointing
    again = "nothing is" if asked is False else "layers are"
    settings = f"{name}, optimizer {config.training.optimizer}, {again} computed again in backward"
    pairs = unit_of(config.preference.rl) == "pairs"
    return text.fit_text(found, card, cards, config.data.sequence_len, settings, pairs=pairs)


def _links(
    config: Config, card: Card | None, gpus: int, interconnect: str | None, per_node: int | None
) -> Links | None:
    """What joins the GPUs of a run on several; None on one."""
    from luthier.plan.links import links_of
    from luthier.plan.read import on_cpu

    if gpus == 1:
        return None
    if config.training.optimizer_in_backward:
        raise ConfigError(
            f"optimizer_in_backward takes steps before the gradients of all {gpus} GPUs are added up: leave it out, or "
            "plan for one"
        )
    return links_of(interconnect, card, gpus, per_node, cpu=on_cpu(config))


def _scaling(config: Config, plan: Plan, speed: dict[str, Any], links: Links, gpus: int) -> Scaling:
    from luthier.plan.strategies import compare

    rate = speed["tokens_per_second"] * speed["flops_per_token"] if "tokens_per_second" in speed else None
    return compare(config, plan.shape, plan.engine, plan.work, plan.card, links, gpus, rate)


def _speed(plan: Plan, stated: float | None, measured: Path | None, mfu: float | None) -> dict[str, Any]:
    """Work and speed of one device as far as they can be known, and where the speed is from."""
    from luthier.plan.work import USUAL_MFU, flops_per_token, measured_speed

    flops = flops_per_token(plan.shape, plan.work, plan.engine)
    found: dict[str, Any] = {"flops_per_token": flops}
    if plan.work.forward_only:
        found["forward_only"] = plan.work.forward_only
    peak = plan.card.tflops if plan.card is not None and plan.engine.compute == 2 else None
    if stated is not None:
        speed, source = stated, "as stated"
    elif measured is not None:
        speed, source = measured_speed(measured), f"measured in {measured}"
    elif peak is not None:
        share = USUAL_MFU if mfu is None else mfu
        assert plan.card is not None
        speed = share * peak * 1e12 / flops
        source = f"{share:.0%} of {plan.card.name}'s {peak:g} TFLOP/s"
        source += ", an assumption: --mfu" if mfu is None else ""
    else:
        return {**found, "why_not": "give --tokens-per-second, --measured RUN, or a --gpu whose peak is known"}
    return {**found, "tokens_per_second": speed, "from": source}


def _cost(plan: Plan, speed: dict[str, Any], price: float | None, scaling: Scaling | None) -> dict[str, Any]:
    """The same for all devices, with hours and cost."""
    found = dict(speed)
    if "tokens_per_second" not in found:
        return found
    if scaling is not None and scaling.chosen.share is not None:
        found["tokens_per_second"] = scaling.chosen.tokens_per_second
        of_each = "each as stated" if found["from"] == "as stated" else f"each {found['from']}"
        found["from"] = (
            f"{scaling.gpus} GPUs, {of_each}, {scaling.chosen.share:.1%} of the time in communication: "
            f"{scaling.chosen.strategy.name}"
        )
    if plan.work.tokens is None:
        return {**found, "why_not": "the number of tokens is not known: --tokens"}
    found["hours"] = plan.work.tokens / found["tokens_per_second"] / 3600
    if price is not None:
        gpus = 1 if scaling is None else scaling.gpus
        found |= {"price_per_hour": price, "cost": price * gpus * found["hours"]}
    return found
