"""Stands in for `luthier train` where a test is about the study: the same files, signals and exit statuses, no model.

The loss falls with the step towards a value that the settings decide: lowest at a learning rate of 1e-3 and for large
ranks. `lora_dropout: 0.5` fails, `lora_dropout: 0.25` comes to no number. A step takes SECONDS.
"""

import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import yaml

SECONDS = float(os.environ.get("FAKE_SECONDS", "0.002"))
stopped = []


def loss_of(config: dict, step: int) -> float:
    base = (math.log10(config.get("learning_rate", 1e-3)) + 3) ** 2 + 8 / config.get("lora_r", 16)
    return base + 1 / (step + 1) + config.get("seed", 0) / 1000


def main(path: str) -> int:
    config = yaml.safe_load(Path(path).read_text())
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("error: another run is writing into it")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    print("threads", os.environ.get("OMP_NUM_THREADS"), "devices", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if config.get("lora_dropout") == 0.5:
        print("some line\nerror: it cannot be trained\n  for this reason")
        return 1
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").unlink(missing_ok=True)
    begun = max((int(each.name.split("-")[1]) for each in folder.glob("checkpoint-*")), default=0)
    print(f"begins at step {begun}")
    total = config.get("max_steps", 10)
    if begun == 0:
        (folder / "metrics.jsonl").write_text("")
    for step in range(begun + 1, total + 1):
        time.sleep(SECONDS)
        value = math.nan if config.get("lora_dropout") == 0.25 else loss_of(config, step)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": value, "eval_loss": value, "peak_memory_gib": 1.5}) + "\n")
        if stopped or step % config.get("save_steps", 1000) == 0:
            (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
            (folder / f"checkpoint-{step}" / "weights").write_bytes(b"0" * 1000)
        if stopped and step < total:
            print(f"stopped after step {step}")
            return 0
    (folder / "adapter_model.safetensors").write_bytes(b"1" * 100)
    summary = {"steps": total, "kept_step": total, "tokens": 100, "seconds": 2.0, "trainable_parameters": 7}
    (folder / "summary.json").write_text(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
