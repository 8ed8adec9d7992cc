"""Folders of runs as the programs leave them, without the training."""

from __future__ import annotations

import json
from pathlib import Path


def write_run(
    root: Path, label: str, seed: int, top1: float, evaluations: dict[str, dict] | None = None, done: bool = True
) -> Path:
    """LABEL/seedN with two epochs, the last of `top1` (the average's is one point better), and JSON files."""
    folder = root / label / f"seed{seed}"
    folder.mkdir(parents=True)
    rows = [
        {"epoch": epoch, "train_loss": 2.0 - epoch, "monitors": {"entropy": 0.5},
         "val": {"model": {"top1": value, "top5": value + 20}, "average": {"top1": value + 1, "top5": float("nan")}}}
        for epoch, value in enumerate((top1 / 2, top1))
    ]  # fmt: skip
    rows.append({"epoch": 2, "train_loss": 0.0})  # an epoch without an evaluation
    (folder / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "untrained.json").write_text(json.dumps({"k-NN": {"20": {"top1": 21.5, "top5": 60.0}}}))
    config = {"arch": "vit_tiny", "mode": label, "seed": seed, "data_path": "/somewhere/private/images"}
    (folder / "config.json").write_text(json.dumps({**config, "output_dir": str(folder)}))
    for name, results in (evaluations or {}).items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"model": {"checkpoint": str(folder / "checkpoint.pth")}, "results": results}))
    (folder / "checkpoint.pth").write_bytes(b"weights")
    if done:
        (folder / "DONE").write_text("")
    return folder
