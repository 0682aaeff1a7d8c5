"""Every key that a config may have, in sections; the keys about data are in `datasets`, those about
preferences in `preference`.

Users write the keys flat, with the names that Axolotl made common; functions take the section that they need
(`config.training`). The string under a field is its help: JSON Schema, `luthier train --help` and the
reference page are made from it. A field's own range is part of its type; what several keys say together is
checked in `rules`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from luthier.config.base import Section
from luthier.config.datasets import DataConfig
from luthier.config.distributed import DistributedConfig
from luthier.config.optimizers import OptimizerName
from luthier.config.preference import PreferenceConfig

Switch = bool | Literal["auto"] | None
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]

Count = Annotated[int, Field(ge=1)]
Interval = Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)]


class SpecialTokens(Section):
    """Special tokens to set on the tokenizer; what is unset stays as the tokenizer has it."""

    bos_token: str | None = None
    """Token that begins a document."""
    eos_token: str | None = None
    """Token that ends a document, and at which generation stops."""
    pad_token: str | None = None
    """Padding token, kept for tools that pad; training never does."""
    unk_token: str | None = None
    """Token for what the vocabulary cannot express."""
    additional_special_tokens: list[str] = []
    """Further tokens that are never split."""


class ModelConfig(Section):
    """Which model and tokenizer are loaded, and how."""

    base_model: str
    """Model to start from: a folder, or an id on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    model_type: str = "AutoModelForCausalLM"
    """Class of transformers that loads the model."""
    tokenizer_config: str | None = None
    """Folder or hub id of the tokenizer. Default: `base_model`."""
    tokenizer_type: str = "AutoTokenizer"
    """Class of transformers that loads the tokenizer."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources that you trust."""
    attn_implementation: str | None = None
    """Attention of transformers, such as `sdpa`, `eager` or `flash_attention_2` (where that is not installed, the
    default, and it is said). Default: the fastest that keeps packed documents apart."""
    device_map: str | dict[str, str | int] | None = None
    """Device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, or a mapping with one entry, `"": device`. Default:
    `auto`."""
    load_in_4bit: bool = False
    """Keep the base model's linear layers in 4 bits (bitsandbytes), for training an adapter on them."""
    load_in_8bit: bool = False
    """Keep them in 8 bits: int8 with a scale for each row (bitsandbytes), for training an adapter on them."""
    load_in_fp8: bool = False
    """Round them to 8-bit floating point and multiply in it, for training an adapter on them: faster on cards from
    Hopper on. The run's first pass proves that the loss stays what it was."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """What 4 bits stand for: quantiles of a normal distribution, or a small floating-point number."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of the 4-bit blocks as well, which saves another 0.4 bits a parameter."""
    rope_parameters: dict[str, Any] | None = None
    """Stretch the model's positions beyond its own, for longer documents: `rope_type` (linear, yarn or llama3),
    `factor`, and what else that type takes, as in a `config.json` of transformers."""
    special_tokens: SpecialTokens = SpecialTokens()
    """Special tokens to set on the tokenizer."""
    tokens: list[str] = []
    """Tokens to add to the vocabulary; the embeddings grow to hold them, and have to be trained."""


class PrecisionConfig(Section):
    """Number formats, and what is traded between memory, speed and repeatability."""

    bf16: Switch = "auto"
    """Compute in bfloat16. `auto`: where the device is fast at it."""
    fp16: Switch = None
    """Compute in float16 with loss scaling, for cards before Ampere. `auto`: where bfloat16 is not there."""
    tf32: Switch = None
    """Let fp32 matrix multiplies use TF32 on NVIDIA cards. `auto`: where the card has it."""
    gradient_checkpointing: bool | Literal["auto", "offload", "unsloth"] = "auto"
    """Keep less for the backward pass and compute it again. `auto`: only as much as memory asks for, the cheap parts
    first; `true`: every layer keeps its input only, for about a third more work; `offload`: and that in the host's
    memory (`unsloth` is another name of it); `false`: nothing is computed again."""
    tiled_mlp: bool | Literal["auto"] = "auto"
    """Run the MLP of a long pass in tiles of tokens and compute their inside again in the backward pass. `auto`: in
    layers that compute it again anyway."""
    dequantized_copies_gib: Annotated[float, Field(ge=0)] = 0.0
    """Memory for copies of quantised (or 16-bit) base weights in the precision that is computed in. A layer that has
    one is not dequantised at each use, which matters where forward passes are short."""
    kernels: Literal["auto", "reference"] = "auto"
    """`auto` replaces norms, MLPs, attention and layers by fused ones, each proven on this very model before the
    first step; `reference` leaves them as transformers has them."""
    deterministic: bool = False
    """Use only operations that give the same bits each time; on CUDA a resumed run is exact with it, and
    slower."""


class LoftQ(Section):
    """How LoftQ sees the base: as it is loaded."""

    loftq_bits: Annotated[int, Field(ge=1)] = 4
    """Bits of the base; 4, as it is loaded."""
    loftq_iter: Annotated[int, Field(ge=1)] = 1
    """Turns of quantising and decomposing; 1, which leaves the base as others load it."""


class AdapterConfig(Section):
    """LoRA: a small trained addition to frozen weights."""

    adapter: Literal["lora", "qlora"] | None = None
    """`lora` trains an adapter, `qlora` one on a base model in 4 bits; unset trains the model itself."""
    lora_r: Count = 16
    """Rank of the adapter's matrices."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """Strength: the adapter's output is multiplied by `lora_alpha / lora_r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is dropped at random while training."""
    lora_target_modules: list[str] | str | None = None
    """Linear layers and embeddings that get an adapter: a list of names (`q_proj`, `embed_tokens`) or one regular
    expression for the full name."""
    lora_target_parameters: list[str] | str = []
    """Parameters that belong to no linear layer and get an adapter, above all a model's experts: names such as
    `experts.gate_up_proj`, each matching the end of a full name."""
    lora_target_linear: bool | None = None
    """Give every linear layer but the head an adapter. Default: true if no target is named."""
    lora_modules_to_save: list[str] = []
    """Modules that are trained in full and saved beside the adapter, such as `embed_tokens` and `lm_head`."""
    peft_use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(lora_r)` instead (rank-stabilised LoRA)."""
    peft_use_dora: bool = False
    """Train the length of every row of the adapted weights as well (DoRA)."""
    peft_init_lora_weights: bool | str = True
    """With what the adapter begins: `true` (A at random, B zero), `gaussian`, `pissa` or the faster
    `pissa_niter_16`, `olora`, `loftq` (needs `load_in_4bit`), or `eva` (directions of the training data)."""
    loftq_config: LoftQ | None = None
    """Begin with what quantising the base left out (LoftQ): `{loftq_bits: 4}`."""
    rank_pattern: dict[str, Count] = {}
    """Ranks of their own: a regular expression for the end of a layer's full name, and the rank, such as `down_proj:
    32`. The first that matches decides; all others have `lora_r`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """The same for `lora_alpha`."""
    lora_rank_budget: Annotated[int | None, Field(ge=1)] = None
    """Trainable parameters of the adapter, spread over the layers by what the training data varies in (EVA); the
    strength of each layer stays that of `lora_r`, at most twice of which it gets."""
    lora_model_dir: str | None = None
    """An adapter to go on training from; its own rank, strength and targets hold."""
    peft_layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of the layers that get an adapter, from 0. Default: all."""


class FreezeConfig(Section):
    """Which parameters are trained when there is no adapter."""

    unfrozen_parameters: list[str] = []
    """Regular expressions; parameters whose full name begins with a match are trained, all others are
    frozen."""
    train_last_n_layers: Annotated[int | None, Field(ge=0)] = None
    """Train the last n layers, the head and, unless `freeze_embeddings`, the embeddings; the rest is
    frozen."""
    freeze_embeddings: bool = False
    """Freeze the input embeddings."""


class LrGroup(Section):
    """Parameters with a learning rate of their own."""

    name: str
    """What to call them."""
    modules: list[str]
    """Parts of the names of their parameters, such as `q_proj` or `layers.0.`, or regular expressions; of two groups
    that fit a parameter the first has it."""
    lr: Annotated[float, Field(gt=0)]
    """Their peak learning rate."""


class TrainingConfig(Section):
    """The optimizer's steps."""

    micro_batch_size: Count = 2
    """Documents (packed rows, with `sample_packing`) per process and accumulation step."""
    gradient_accumulation_steps: Count = 1
    """Micro batches that make one optimizer step."""
    num_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data; may be a fraction."""
    max_steps: Annotated[int | None, Field(ge=1)] = None
    """Optimizer steps after which training ends, whatever `num_epochs` says."""
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    """Peak learning rate. Default: 2e-4 with an adapter, 2e-5 without."""
    lr_scheduler: Literal["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"] = (
        "cosine"
    )
    """How the learning rate goes down after the warm-up."""
    cosine_min_lr_ratio: Annotated[float | None, Field(ge=0, lt=1)] = None
    """Where the cosine ends, as a fraction of the peak."""
    warmup_steps: Annotated[int | None, Field(ge=0)] = None
    """Steps over which the learning rate rises from 0 to its peak."""
    warmup_ratio: Annotated[float | None, Field(ge=0, le=1)] = None
    """The same as a fraction of all steps."""
    optimizer: OptimizerName = "adamw_torch_fused"
    """Which optimizer. Those of bitsandbytes (8bit, paged) need `luthier[bitsandbytes]`, sophia and
    schedule_free_adamw `luthier[optimizers]`."""
    optimizer_in_backward: bool = False
    """Let each weight take its step as soon as its gradient is there, which is freed at once: the gradients never
    exist together. For training without an adapter, with a step that is one forward pass."""
    bf16_stochastic_rounding: bool = False
    """Train weights in bfloat16 without fp32 copies: each step's result is rounded up or down at random, so that what
    is smaller than the rounding counts on average. For training without an adapter."""
    loraplus_lr_ratio: Annotated[float | None, Field(gt=0)] = None
    """LoRA+: the adapter's B matrices (and its vectors) learn this many times faster than A, such as 16."""
    loraplus_lr_embedding: Annotated[float | None, Field(gt=0)] = None
    """LoRA+: peak learning rate of adapters on embeddings. Default: 1e-6."""
    lr_groups: list[LrGroup] = []
    """Peak learning rates of their own for parts of the model: a list of name, modules and lr. All follow the same
    schedule."""
    optim_args: dict[str, Any] = {}
    """Further arguments of the optimizer, such as `momentum: 0.9` for sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients with a larger norm are scaled down to it; 0 turns this off."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's decay of the mean gradient."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's decay of the mean squared gradient."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's term against division by zero."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of everything random: data order, adapter, dropout."""
    max_tokens_per_pass: Count | Literal["auto"] = "auto"
    """Most tokens in one forward pass; a step is cut into as few passes as fit, which does not change its
    result. `auto`: what memory has room for, at most a whole step and on a CPU no more than is fastest. Out of
    memory, a run goes on with half."""
    share_prefixes: Literal["auto", "off"] = "auto"
    """What documents of one forward pass begin with alike (a template, a question) is computed once, which does
    not change the result. `auto`: where the model allows it, and no dropout tells the documents apart; with dropout
    the two answers of a pair still share their prompt."""


class OutputConfig(Section):
    """Where a run is written, and how often it is saved."""

    output_dir: str = "./model-out"
    """The run folder."""
    overwrite_output_dir: bool = False
    """Start afresh in a folder that already holds a run, which is lost."""
    resume_from_checkpoint: str | bool | None = None
    """`auto` (or true) goes on from the newest whole checkpoint of `output_dir`, if there is one; or the path
    of one."""
    save_steps: Interval | None = None
    """Steps between checkpoints, or below 1 a fraction of all steps."""
    saves_per_epoch: Annotated[int | None, Field(ge=0)] = None
    """Checkpoints in each epoch, the last one at its end; 0 for none. Default: 1, if `save_steps` is unset
    too."""
    save_total_limit: Annotated[int | None, Field(ge=1)] = None
    """Checkpoints that are kept; older ones are deleted. Default: all."""
    load_best_model_at_end: bool = False
    """End with the weights that had the lowest evaluation loss instead of the last ones."""


class EvaluationConfig(Section):
    """What is measured on held-out data during the run, and which samples are written."""

    eval_steps: Interval | None = None
    """Steps between evaluations, or below 1 a fraction of all steps."""
    evals_per_epoch: Annotated[int | None, Field(ge=0)] = None
    """Evaluations in each epoch, the last one at its end; 0 for none. Default: 1, if there is something to
    evaluate and `eval_steps` is unset too."""
    eval_batch_size: Annotated[int | None, Field(ge=1)] = None
    """Documents in one evaluation batch. Default: `micro_batch_size`."""
    early_stopping_patience: Annotated[int | None, Field(ge=1)] = None
    """End the run after this many evaluations in a row without a lower loss."""
    general_eval: bool | Literal["auto"] = "auto"
    """Measure the shipped general set before the first step and at the end, to see what the run forgets
    (`evaluation/general.json`). `auto`: where that costs at most 3% of the run's own tokens."""
    generate_samples: bool = False
    """Let the model answer at each evaluation, and write what it says to `samples.jsonl`. True by itself
    where `sample_prompts` or `num_generation_samples` is set."""
    sample_prompts: list[str] = []
    """Prompts to answer, set in the format of the first dataset."""
    num_generation_samples: Annotated[int | None, Field(ge=1)] = None
    """How many rows of the validation data are answered as well."""
    generation_max_new_tokens: Annotated[int | None, Field(ge=1)] = None
    """Longest sample, in tokens. Default: the model's generation config."""
    generation_temperature: Annotated[float | None, Field(ge=0)] = None
    """Temperature of sampling. Default: the model's generation config."""
    generation_top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    """Probability mass to sample from. Default: the model's generation config."""
    generation_top_k: Annotated[int | None, Field(ge=0)] = None
    """Number of likeliest tokens to sample from; 0 for all. Default: the model's generation config."""
    generation_do_sample: bool | None = None
    """Sample, or always take the likeliest token. Default: the model's generation config."""


class LoggingConfig(Section):
    """What is logged, and where to."""

    logging_steps: Interval = 10
    """Steps between rows of `metrics.jsonl`, or below 1 a fraction of all steps."""
    report_to: list[Tracker] | Tracker = []
    """Trackers that get the metrics too."""
    wandb_project: str | None = None
    """Project on Weights & Biases; turns that tracker on."""
    wandb_entity: str | None = None
    """User or team that owns the project."""
    wandb_name: str | None = None
    """Name of the run."""
    wandb_job_type: str | None = None
    """Kind of the run, such as `train`."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Whether runs are sent at once, kept in files, or not logged at all."""
    wandb_tags: list[str] = []
    """Tags of the run."""
    wandb_log_model: Literal[False, "false", "end", "checkpoint"] = False
    """Upload the adapter or the model as an artifact of the run: at its end, or every checkpoint too."""


class Sections(BaseModel):
    """All sections; the text under each is its heading."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )

    model: ModelConfig
    """Model and tokenizer"""
    data: DataConfig
    """Data"""
    adapter: AdapterConfig
    """Adapter"""
    freeze: FreezeConfig
    """Training without an adapter"""
    precision: PrecisionConfig
    """Precision and memory"""
    training: TrainingConfig
    """Training"""
    preference: PreferenceConfig
    """Preference tuning"""
    distributed: DistributedConfig
    """Several processes"""
    evaluation: EvaluationConfig
    """Evaluation and samples"""
    output: OutputConfig
    """Output and checkpoints"""
    logging: LoggingConfig
    """Logging"""


SECTIONS: dict[str, type[Section]] = {
    name: info.annotation  # type: ignore[misc]
    for name, info in Sections.model_fields.items()
}
FIELDS: dict[str, FieldInfo] = {
    key: info for section in SECTIONS.values() for key, info in section.model_fields.items()
}
SECTION_OF: dict[str, str] = {key: name for name, section in SECTIONS.items() for key in section.model_fields}
