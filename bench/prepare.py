"""Makes what all contenders share, once: the model folder and the rows.

    python -m bench.prepare SHAPE TASK ROWS LIMIT MODEL_FOLDER ROWS_FILE REPORT

It runs in a process of its own, because the one that measures must not load torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench import rows, shapes


def main(shape: str, task: str, count: int, limit: int, model: Path, rows_file: Path, report: Path) -> None:
    from transformers import AutoTokenizer

    if not model.exists():
        shapes.build(shapes.SHAPES[shape], model)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    kept = rows.fitting(rows.all_rows(task), count, length, limit)
    rows_file.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8"
    )
    lengths = [sum(length(text) + 1 for text in rows.texts(row)) for row in kept]
    report.write_text(json.dumps({"rows": len(kept), "lengths": lengths}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]), *map(Path, sys.argv[5:8]))
