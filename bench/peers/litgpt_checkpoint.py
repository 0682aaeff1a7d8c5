"""LitGPT trains from a folder format of its own: makes it from the model folder, with LitGPT's converter.

python -m bench.peers.litgpt_checkpoint MODEL_FOLDER TARGET
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any


def config_of(values: dict[str, Any]) -> dict[str, Any]:
    """LitGPT's names for what a Llama's or a Qwen3's config.json says."""
    return {
        # The converter goes by the beginning of the name.
        "name": f"{values['model_type']}-bench",
        "hf_config": {"org": "bench", "name": f"{values['model_type']}-bench"},
        "block_size": values["max_position_embeddings"],
        "vocab_size": values["vocab_size"],
        "padded_vocab_size": values["vocab_size"],
        "n_layer": values["num_hidden_layers"],
        "n_head": values["num_attention_heads"],
        "n_embd": values["hidden_size"],
        "n_query_groups": values["num_key_value_heads"],
        "head_size": values["head_dim"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": values["rms_norm_eps"],
        "norm_qk": values["model_type"] == "qwen3",
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": values["intermediate_size"],
        "rope_base": int((values.get("rope_parameters") or values)["rope_theta"]),
    }


def main() -> None:
    from litgpt.config import name_to_config
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    config = config_of(json.loads((source / "config.json").read_text(encoding="utf-8")))
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    name_to_config[config["name"]] = config
    convert_hf_checkpoint(partial, model_name=config["name"])
    partial.rename(target)


if __name__ == "__main__":
    main()
