"""`luthier plan --num-gpus`: bytes on each rank, bytes on the wire, what is recommended, and one message a mistake.

Expected bytes are added up from the toy model's own parameters, as the ZeRO paper (sections 5 and 7) and FSDP2's
documentation count them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from luthier import cli
from luthier.config import AdapterConfig, Config
from luthier.errors import ConfigError
from luthier.models.lora import add_lora
from luthier.plan.cards import CONTEXT_BYTES, FILLED, card_named
from luthier.plan.engine import Engine, Pass, Sharding
from luthier.plan.links import Links, links_of
from luthier.plan.memory import Memory, memory_of
from luthier.plan.read import sharding_of
from luthier.plan.shape import Shape, shape_of
from luthier.plan.strategies import strategies
from luthier.plan.traffic import Compute, traffic
from tests.models.families import toy_model

ONE = Pass(1, 1, 1, 1, several=True)  # next to no activations
RANKS = 4
FSDP, KEPT = Sharding(RANKS, 3, fsdp=True), Sharding(RANKS, 3, fsdp=True, reshard=False)
ZERO = {stage: Sharding(RANKS, stage) for stage in (1, 2, 3)}
ALL = [Sharding(), FSDP, KEPT, *ZERO.values()]
LINKS = Links(inner=1e9, node=1e9, per_node=64, host=1e8, said="")


class Counted:
    """A toy model and its parameters, counted here: LoRA's and its own, of layers and outside of them."""

    def __init__(self, lora: bool) -> None:
        model = toy_model("llama", num_hidden_layers=3, tie_word_embeddings=False)
        if lora:
            add_lora(model, AdapterConfig(adapter="lora", lora_r=3, lora_target_linear=True), 0)
        else:
            model.train().requires_grad_(True)
        named = dict(model.named_parameters())
        self.lora = sum(p.numel() for name, p in named.items() if ".lora_" in name)
        self.own = sum(p.numel() for name, p in named.items() if ".lora_" not in name)
        self.layers = [_own(layer) for layer in model.model.layers]
        self.root = self.own - sum(self.layers)
        self.shape: Shape = shape_of(model)
        assert self.root == sum(p.numel() for p in (named["lm_head.weight"], *_outer(model)))

    def memory(self, sharding: Sharding) -> Memory:
        return memory_of(self.shape, Engine(sharding=sharding, compute=2), ONE)


def _own(layer: nn.Module) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if "lora_" not in name)


def _outer(model: Any) -> list[nn.Parameter]:
    return [model.model.embed_tokens.weight, model.model.norm.weight]


@pytest.fixture(scope="module")
def full() -> Counted:
    return Counted(lora=False)


@pytest.fixture(scope="module")
def lora() -> Counted:
    return Counted(lora=True)


# --- memory -------------------------------------------------------------------------------------------------


def test_bytes_of_a_fully_trained_model(full: Counted) -> None:
    assert full.lora == 0
    P, N = full.own, RANKS
    gathered = 2 * (full.root + sum(sorted(full.layers)[-2:]))
    # sharding -> resting weights, what a pass gathers, Adam and fp32 copies, gradients at rest
    expected = {
        Sharding(): (2 * P, 0, 12 * P, 4 * P),
        ZERO[1]: (2 * P, 0, 12 * P / N, 4 * P),
        ZERO[2]: (2 * P, 0, 12 * P / N, 4 * P / N),
        ZERO[3]: (2 * P / N, gathered, 12 * P / N, 4 * P / N),
        FSDP: (4 * P / N, gathered, 8 * P / N, 4 * P / N),
        Sharding(N, 3, offload=True): (0, gathered, 0, 0),
    }
    for sharding, (weights, of_pass, optimizer, gradients) in expected.items():
        found = full.memory(sharding)
        here = of_pass if found.moment != "optimizer step" else 0
        waiting = 0.0
        if sharding.fsdp:  # FSDP2's unreduced gradients, in 16 bits and, on their way, in fp32
            at_end = found.moment == "end of backward"
            waiting = (2 + 4) * full.root if at_end else 2 * full.root + (2 + 4) * max(full.layers)
        assert found.weights == pytest.approx(weights + here), sharding
        assert found.optimizer == pytest.approx(optimizer), sharding
        assert found.gradients == pytest.approx(gradients + waiting), sharding


def test_bytes_beside_an_adapter(lora: Counted) -> None:
    single = lora.memory(Sharding())
    assert single.weights == 2 * lora.own
    gathered = 2 * (lora.root + sum(sorted(lora.layers)[-2:]))
    everything = 2 * lora.own
    for sharding, of_pass in ((FSDP, gathered), (KEPT, everything)):
        found = lora.memory(sharding)
        assert found.moment != "optimizer step"
        assert found.weights == pytest.approx(2 * lora.own / RANKS + of_pass)
        # the adapter is whole everywhere
        assert (found.adapters, found.optimizer) == (single.adapters, 8 * lora.lora)
        assert found.gradients == 4 * lora.lora
    for stage in (1, 2):
        found = lora.memory(ZERO[stage])
        # DeepSpeed has fp32 copies beside the adapter's own
        assert found.weights == single.weights and found.optimizer == (4 + 8) * lora.lora / RANKS


def test_quantised_layers_are_gathered_as_they_are_stored(lora: Counted) -> None:
    rows = lora.shape.linear_rows
    in_layers = sum(lora.layers)
    linear = lora.shape.linear
    engine = Engine(sharding=FSDP, quantised="8bit")
    stored = linear + 4 * rows + 2 * (lora.own - linear)
    two = (linear + 4 * rows + 2 * (in_layers - linear)) * 2 / len(lora.layers)
    assert memory_of(lora.shape, engine, ONE).weights == pytest.approx(stored / RANKS + two + 2 * lora.root)


def test_zero_lets_weights_live_and_has_buffers(full: Counted) -> None:
    live = replace(ZERO[3], live=full.own)
    assert full.memory(live).weights == pytest.approx(2 * full.own / RANKS + 2 * full.own)
    small = replace(ZERO[3], live=1)
    assert full.memory(small).weights == full.memory(ZERO[3]).weights
    assert full.memory(replace(ZERO[3], bucket=1000)).total == pytest.approx(full.memory(ZERO[3]).total + 4 * 1000)
    both = full.memory(replace(ZERO[2], bucket=10**7))
    assert both.gradients == pytest.approx(4 * full.own / RANKS + 2 * 4 * 10**7)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_more_gpus_never_need_more_memory_each(kind: str, request: pytest.FixtureRequest) -> None:
    counted: Counted = request.getfixturevalue(kind)
    for sharding in ALL[1:]:
        sizes = [counted.memory(replace(sharding, over=over)).total for over in (2, 3, 4, 8, 64, 1024)]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1], sharding


# --- communication ------------------------------------------------------------------------------------------


def _sent(counted: Counted, sharding: Sharding, passes: int = 1, links: Links = LINKS, gpus: int = RANKS) -> Any:
    return traffic(counted.shape, Engine(sharding=sharding), links, gpus, passes, Compute())


def test_bytes_on_the_wire_are_those_of_the_papers(full: Counted, lora: Counted) -> None:
    P, ring = full.own, (RANKS - 1) / RANKS
    weights, gradients = 2 * P, 4 * P
    assert _sent(full, Sharding()).sent == pytest.approx(2 * ring * gradients)
    # ZeRO, section 7: stages 1 and 2 like replicas (a reduce-scatter and an all-gather), stage 3 half as much again
    assert _sent(full, ZERO[1]).sent == pytest.approx(ring * (gradients + weights))
    assert _sent(full, ZERO[1], 3).sent == pytest.approx(ring * (gradients + weights))
    assert _sent(full, ZERO[2], 3).sent == pytest.approx(ring * (3 * gradients + weights))
    assert _sent(full, ZERO[3], 3).sent == pytest.approx(3 * ring * (2 * weights + gradients))
    assert _sent(full, FSDP, 3).sent == pytest.approx(3 * ring * (2 * weights + gradients))
    assert _sent(full, KEPT).sent == pytest.approx(ring * (weights + 2 * full.root + gradients))
    # FSDP beside an adapter: the base in every pass, the adapter once a step
    base, adapter = 2 * lora.own, 4 * lora.lora
    assert _sent(lora, FSDP, 3).sent == pytest.approx(ring * (3 * 2 * base + 2 * adapter))
    assert _sent(lora, Sharding(), 3).sent == pytest.approx(2 * ring * adapter)
    # a reference model gathers the base once more
    more = traffic(lora.shape, Engine(sharding=FSDP), LINKS, RANKS, 1, Compute(forward_only=1))
    assert more.sent == pytest.approx(ring * (3 * base + 2 * adapter))


def test_seconds_are_bytes_over_speed_and_the_hosts_beside(full: Counted) -> None:
    for sharding in ALL:
        found = _sent(full, sharding, 2)
        assert found.seconds == pytest.approx(found.sent / 1e9) and found.exposed == pytest.approx(found.seconds)
    found, away = _sent(full, ZERO[3]), _sent(full, replace(ZERO[3], offload=True))
    assert away.seconds - found.seconds == pytest.approx((2 * 2 + 4) * full.own / RANKS / 1e8)


def test_hybrid_sharding_gathers_in_a_machine_and_sums_between(full: Counted) -> None:
    links = Links(inner=1e9, node=1e8, per_node=RANKS, host=1, said="")
    found = _sent(full, FSDP, links=links, gpus=2 * RANKS)
    inside, shard = (RANKS - 1) / RANKS * (2 + 2 + 4) * full.own, full.own / RANKS
    between = 2 * (1 / 2) * 4 * shard
    assert found.sent == pytest.approx(inside + between)
    # the ranks of a machine share its way out
    assert found.seconds == pytest.approx(inside / 1e9 + between / (1e8 / RANKS))
    whole = _sent(full, replace(FSDP, over=2 * RANKS), links=links, gpus=2 * RANKS)
    assert whole.seconds == pytest.approx(whole.sent / 1e8) and whole.seconds > found.seconds


@pytest.mark.parametrize("compute", [0.0, 1e-5, 3e-5, 1e-4, 1.0])
def test_what_is_not_hidden_is_what_two_queues_would_wait(compute: float, lora: Counted) -> None:
    """A queue of gathers and one of layers: a gather begins with the layer before it."""
    gathers = [(RANKS - 1) / RANKS * 2 * size / 1e9 for size in lora.layers]
    root = (RANKS - 1) / RANKS * 2 * lora.root / 1e9
    ends = 0.0
    for order in (gathers, gathers[::-1]):
        ready = ends + root + order[0]
        for index in range(len(order)):
            begin = ready
            ends = begin + compute / len(order)
            if index + 1 < len(order):
                ready = max(ends, begin + order[index + 1])
    step = 2 * (RANKS - 1) / RANKS * 4 * lora.lora / 1e9
    found = traffic(lora.shape, Engine(sharding=FSDP), LINKS, RANKS, 1, Compute(compute, compute))
    assert found.exposed == pytest.approx(ends - 2 * compute + step)
    on_cpu = traffic(lora.shape, Engine(sharding=FSDP, cpu=True), LINKS, RANKS, 1, Compute(compute, compute))
    assert on_cpu.exposed == on_cpu.seconds


# --- links --------------------------------------------------------------------------------------------------


def test_speeds_by_name_and_by_number() -> None:
    h200, t4 = card_named("h200"), card_named("t4")
    assert links_of("nvlink", h200, 8, None, cpu=False).inner == 0.8 * 450e9
    assert links_of(None, h200, 8, None, cpu=False).inner == 0.8 * 450e9
    assert links_of(None, t4, 2, None, cpu=False).inner == pytest.approx(0.8 * 15.75e9, rel=1e-3)
    for text, speed in (("450GB/s", 450e9), ("400Gbit/s", 50e9), ("400Gb/s", 50e9), ("1.5 GiB/s", 1.5 * 2**30)):
        assert links_of(text, None, 2, None, cpu=True).inner == speed
    both = links_of("nvlink,infiniband", h200, 16, 8, cpu=False)
    assert (both.inner, both.node) == (0.8 * 450e9, 8 * 0.8 * 50e9)
    assert both.speed(8) == both.inner and both.speed(16) == 320e9 and both.speed(2, stride=8) == 40e9
    assert links_of("pcie5,ethernet", h200, 4, 2, cpu=False).node == 0.8 * 12.5e9
    alone = links_of("infiniband", h200, 4, 1, cpu=False)
    assert alone.speed(4) == 40e9
    assumed = links_of(None, h200, 16, 8, cpu=False)
    assert assumed.node == both.node and assumed.said.count("an assumption") == 2


# --- the command --------------------------------------------------------------------------------------------

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(tmp_path: Path, toy_llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> Plan:
    """plan(*arguments, **keys) -> status, stdout, stderr, for 30 rows of full fine-tuning."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n} and {n}" * (1 + n % 3)}) + "\n" for n in range(30)))

    def run(*arguments: str, **keys: Any) -> tuple[int, str, str]:
        path = tmp_path / "cfg.yml"
        values = {
            "base_model": str(toy_llama_dir),
            "datasets": [{"path": str(rows), "type": "completion"}],
            "sequence_len": 256,
            "micro_batch_size": 4,
            **keys,
        }
        path.write_text(yaml.safe_dump(values))
        status = cli.main(["plan", str(path), *arguments])
        return status, *capfd.readouterr()

    return run


def planned(plan: Plan, *arguments: str, **keys: Any) -> dict[str, Any]:
    status, out, err = plan("--json", *arguments, **keys)
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["scaling"]["strategies"]}


def test_replicas_are_the_plan_of_one_gpu_and_steps_are_larger(plan: Plan) -> None:
    stated, several = ("--memory", "24GiB", "--rows", "30"), ("--num-gpus", "4", "--tokens-per-second", "1000")
    alone, found = planned(plan, *stated), planned(plan, *stated, *several)
    assert "scaling" not in alone
    assert found["memory"] == by_name(found)["replicas"]["memory"] == alone["memory"]
    assert alone["work"]["steps"] == 8 and found["work"]["steps"] == 2
    alone, found = planned(plan, "--memory", "24GiB"), planned(plan, "--memory", "24GiB", *several)
    assert alone["work"]["steps"] == 8 and found["work"]["steps"] == 2  # 30 rows by 4, and by 4 x 4
    assert found["work"]["tokens"] == alone["work"]["tokens"]
    row = by_name(found)["replicas"]
    assert row["chosen"] and row["tokens_per_second"] == pytest.approx(
        4000 * (1 - row["communication"]["share"])
    )
    assert found["speed"]["tokens_per_second"] == row["tokens_per_second"]


def test_what_is_recommended_depends_on_what_fits(plan: Plan) -> None:
    arguments = ("--num-gpus", "4", "--tokens-per-second", "1000", "--interconnect", "10GB/s", "--rows", "30")
    keys = {"gradient_checkpointing": True, "micro_batch_size": 1}
    rows = by_name(planned(plan, "--memory", "24GiB", *arguments, **keys))
    need = {name: row["memory"]["total"] for name, row in rows.items()}
    assert need["fsdp"] < need["replicas"] < need["zero2"]  # whose buffers are larger than this model

    def at(size: float) -> dict[str, Any]:
        mib = (size / FILLED + CONTEXT_BYTES) / 2**20
        found = planned(plan, "--memory", f"{mib:.6f}MiB", *arguments, **keys)
        return dict(found["scaling"])

    ample = at(need["replicas"] + 2**13)
    assert ample["recommended"] == "replicas" and yaml.safe_load(ample["yaml"]) == {"ddp": True}
    tight = at((need["fsdp"] + need["replicas"]) / 2)
    assert tight["recommended"].startswith("fsdp") and "replicas: too large" in tight["why"]
    assert yaml.safe_load(tight["yaml"])["fsdp_version"] == 2
    least = min(need.values())
    none = at(least - 2**13)
    assert none["recommended"] is None and "none fits" in none["why"]


def test_what_is_gained_in_less_than_a_millisecond_of_a_step_is_no_reason(plan: Plan) -> None:
    """What collectives take to begin is not counted: for a tiny model that is all of it."""
    arguments = ("--gpu", "h200", "--num-gpus", "8", "--rows", "30", "--interconnect")
    quick, slow = (planned(plan, *arguments, link) for link in ("nvlink", "1MB/s"))
    for found in (quick, slow):
        rate = {name: row["tokens_per_second"] for name, row in by_name(found).items()}
        assert rate["zero1"] > 1.02 * rate["replicas"]
    assert quick["scaling"]["recommended"] == "replicas"
    assert slow["scaling"]["recommended"] != "replicas"


def test_keys_of_every_strategy_choose_it(plan: Plan, toy_llama_dir: Path) -> None:
    arguments = ("--memory", "9GiB", "--num-gpus", "8", "--gpus-per-node", "4", "--interconnect", "9GB/s,1GB/s")
    rows = by_name(planned(plan, *arguments))
    assert list(rows) == [
        "replicas", "fsdp", "fsdp, no reshard", "hybrid 4 x 2", "zero1", "zero2", "zero3", "zero3_offload"
    ]  # fmt: skip
    flat = {"base_model": str(toy_llama_dir), "datasets": [{"path": "x", "type": "completion"}]}
    known = {strategy.name: strategy for strategy in strategies(Config.from_flat(flat), 8, 4)}
    for name, row in rows.items():
        assert row["refused"] is None
        config = Config.from_flat({**flat, **row["keys"]})
        assert sharding_of(config, 8) == known[name].sharding
    again = planned(plan, *arguments, **rows["hybrid 4 x 2"]["keys"])
    assert [name for name, row in by_name(again).items() if row["chosen"]] == ["hybrid 4 x 2"]
    assert again["memory"] == rows["hybrid 4 x 2"]["memory"]
    status, out, _ = plan(*arguments, **rows["zero1"]["keys"])
    assert status == 0 and "  *  zero1" in out


def test_a_strategy_that_is_the_configs_own(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}))
    arguments = ("--memory", "9GiB", "--num-gpus", "2")
    rows = by_name(planned(plan, *arguments, deepspeed=str(tmp_path / "ds.json")))
    assert rows["as the config"]["chosen"] and not rows["zero2"]["chosen"]
    smaller = rows["zero2"]["memory"]["total"] - rows["as the config"]["memory"]["total"]
    assert smaller == pytest.approx(2 * 4 * (500_000_000 - 1000), rel=0.01)


def test_offloading_by_fsdp_leaves_what_is_gathered(plan: Plan) -> None:
    arguments, keys = ("--memory", "9GiB", "--num-gpus", "2"), {"fsdp_config": {"fsdp_offload_params": True}}
    rows = by_name(planned(plan, *arguments, fsdp_version=2, **keys))
    own, fsdp = rows["as the config"], rows["fsdp"]
    assert own["chosen"] and own["keys"]["fsdp_config"]["offload_params"] is True
    assert own["memory"]["total"] < fsdp["memory"]["total"] and own["memory"]["optimizer"] == 0
    assert own["communication"]["all"] > fsdp["communication"]["all"]


def test_what_the_config_cannot_have_is_said(plan: Plan) -> None:
    keys = {"adapter": "qlora", "lora_r": 4}
    found = planned(plan, "--memory", "9GiB", "--num-gpus", "2", **keys)
    refused = {name for name, row in by_name(found).items() if row["refused"]}
    assert refused == {"zero3", "zero3_offload"} and found["scaling"]["recommended"] == "replicas"
    _, out, _ = plan("--memory", "9GiB", "--num-gpus", "2", **keys)
    assert "zero3: not with this config: ZeRO's stage 3" in out and "the config has it already" in out


def test_text_has_the_figures_of_json(plan: Plan) -> None:
    arguments = ("--gpu", "h200", "--num-gpus", "8", "--interconnect", "nvlink", "--price-per-hour", "2")
    found = planned(plan, *arguments)
    _, out, _ = plan(*arguments)
    row = by_name(found)["zero3"]
    line = next(line for line in out.splitlines() if line.strip().startswith("zero3 "))
    assert f"{row['memory']['total'] / 2**30:,.2f} GiB" in line and f"{row['communication']['share']:.1%}" in line
    assert "8 GPUs, nvlink (450 GB/s each way, of which 80% are taken)" in out
    assert found["speed"]["cost"] == pytest.approx(8 * 2 * found["speed"]["hours"])
    assert "for each of 8 GPUs" in out


@pytest.mark.parametrize(
    ("arguments", "keys", "words"),
    [
        (["--interconnect", "nvlink", "--gpu", "h100"], {}, "say with --num-gpus"),
        (["--gpus-per-node", "2", "--gpu", "h100"], {}, "say with --num-gpus"),
        (["--num-gpus", "2", "--gpu", "h100", "--interconnect", "string"], {}, "no link that is known"),
        (["--num-gpus", "2", "--gpu", "h100", "--interconnect", "0GB/s"], {}, "no link that is known"),
        (["--num-gpus", "2", "--gpu", "h100", "--interconnect", ""], {}, "name one link"),
        (["--num-gpus", "2", "--gpu", "t4", "--interconnect", "nvlink"], {}, "t4 has no nvlink; it has pcie3"),
        (["--num-gpus", "4", "--gpu", "a6000", "--interconnect", "nvlink"], {}, "a bridge joins two"),
        (["--num-gpus", "2", "--memory", "9GiB", "--interconnect", "nvlink"], {}, "name it with --gpu"),
        (["--num-gpus", "2", "--gpu", "h100", "--interconnect", "infiniband"], {}, "joins machines"),
        (["--num-gpus", "2", "--gpu", "h100", "--interconnect", "nvlink,ethernet"], {}, "name one link"),
        (
            ["--num-gpus", "4", "--gpus-per-node", "2", "--gpu", "h100", "--interconnect", "pcie5,nvlink"],
            {},
            "does not join machines",
        ),
        (["--num-gpus", "4", "--gpus-per-node", "3", "--gpu", "h100"], {}, "do not fill machines of 3"),
        (["--num-gpus", "2"], {"device_map": "cpu"}, "no link between them is usual"),
        (["--num-gpus", "2", "--interconnect", "pcie4"], {"device_map": "cpu"}, "state a speed"),
        (["--num-gpus", "2", "--gpu", "h100"], {"optimizer_in_backward": True, "max_grad_norm": 0}, "plan for one"),
        (
            ["--num-gpus", "4", "--gpu", "h100"],
            {"fsdp_version": 2, "dp_shard_size": 2, "dp_replicate_size": 4},
            "make the product the number of GPUs",
        ),
    ],
)
def test_mistakes(arguments: list[str], keys: dict[str, Any], words: str, plan: Plan) -> None:
    status, _, err = plan(*arguments, **keys)
    assert status == 2 and words in err and "Traceback" not in err


def test_sizes_that_do_not_fit_the_number_of_gpus() -> None:
    flat = {"base_model": "x", "datasets": [{"path": "x", "type": "completion"}], "fsdp_version": 2}
    with pytest.raises(ConfigError, match="dp_shard_size 2 x dp_replicate_size 1 are 2"):
        sharding_of(Config.from_flat({**flat, "dp_shard_size": 2}), 4)
    assert sharding_of(Config.from_flat({**flat, "dp_replicate_size": 2}), 4).over == 2
