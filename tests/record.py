"""Record short runs, so that two commits can be compared bit for bit on the machine at hand.

    python -m tests.record --output /tmp/now                                      this checkout
    python -m tests.record --output /tmp/before --checkout ../before              another one, of any commit
    python -m tests.record --output /tmp/now --against /tmp/before                run, compare, and continue
    python -m tests.record --write_golden                                         the records that stay in the tree

A record holds the losses of 20 steps, a hash of all weights, momenta and centers at the end, and a checkpoint from the
middle of the run. With `--against`, the middle checkpoints of the other record are continued by this checkout as well:
they must end in the same bits. Exit code 1 tells that something differs.

Every run is a process of its own (`python main_dino.py ...` in the checkout), so this program works with any commit
whose flags are those of today. The images are some of the built-in ones, as PNG files next to the record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.processes import free_port
from tests.tensorboard_tags import scalars

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "records.json"
STEPS, MIDDLE = 20, 10

_COMMON = [
    "--epochs", "5", "--max_steps", str(STEPS), "--global_batch_size", "16",
    "--out_dim", "64", "--num_workers", "0", "--matmul_precision", "highest", "--device", "cpu", "--report", "false",
    "--eval_every", "0", "--checkpoint_every_steps", str(MIDDLE), "--keep_checkpoints", "9", "--saveckp_freq", "0",
    # Schedules that move much from one step to the next.
    "--warmup_epochs", "1", "--min_lr", "1e-5", "--weight_decay", "0.04", "--weight_decay_end", "0.4",
    "--momentum_teacher", "0.8", "--warmup_teacher_temp", "0.04", "--teacher_temp", "0.07",
    "--warmup_teacher_temp_epochs", "3", "--freeze_last_layer", "1", "--norm_last_layer", "false",
]  # fmt: skip
_VIT = [
    "--arch", "vit_small", "--patch_size", "8", "--embed_dim", "48", "--depth", "3", "--num_heads", "3",
    "--img_size", "32", "--local_crops_size", "16", "--local_crops_number", "3", "--lr", "0.02", "--clip_grad", "0.3",
    "--drop_path_rate", "0.2", "--optimizer", "adamw", "--mode", "simpool",
]  # fmt: skip
_RESNET = [
    "--arch", "resnet18", "--mode", "simpool", "--img_size", "64", "--local_crops_size", "40",
    "--local_crops_number", "1", "--drop_path_rate", "0", "--use_bn_in_head", "true", "--optimizer", "lars",
    "--lr", "4", "--clip_grad", "0",
]  # fmt: skip
_CONVNEXT = [
    "--arch", "convnext_tiny", "--mode", "simpool", "--img_size", "32", "--local_crops_size", "32",
    "--local_crops_number", "0", "--drop_path_rate", "0.3", "--optimizer", "adamw", "--lr", "0.01",
    "--clip_grad", "0.3", "--freeze_last_layer", "2",
]  # fmt: skip
_TWO_FORWARDS = ["--grad_accum", "2"]

# name -> (flags behind the common ones, number of processes)
RUNS: dict[str, tuple[list[str], int]] = {
    "vit": (_VIT, 1),
    "vit_bf16": ([*_VIT, "--amp", "bf16"], 1),
    "vit_accumulation": ([*_VIT, *_TWO_FORWARDS], 1),
    "vit_two_ranks": (_VIT, 2),
    "vit_two_ranks_accumulation": ([*_VIT, *_TWO_FORWARDS, "--amp", "bf16"], 2),
    "vit_sharded": ([*_VIT, "--fsdp", "true"], 2),
    "vit_official": ([*_VIT, "--mode", "official", "--norm_last_layer", "true", "--optimizer", "sgd"], 1),
    "vit_checkpointing": ([*_VIT, "--grad_checkpointing", "true", "--gamma", "None"], 1),
    "resnet18": (_RESNET, 1),
    "resnet18_bf16": ([*_RESNET, "--amp", "bf16", "--mode", "official", "--optimizer", "sgd", "--lr", "0.3"], 1),
    "resnet18_two_ranks": ([*_RESNET, *_TWO_FORWARDS], 2),
    "convnext": (_CONVNEXT, 1),
    "convnext_bf16": ([*_CONVNEXT, "--amp", "bf16"], 1),
    "timm_resnet10t": ([*_RESNET, "--arch", "resnet10t", "--optimizer", "adamw", "--lr", "0.01"], 1),
}
_IN_THE_TREE = ("vit", "vit_bf16", "vit_accumulation", "vit_official")  # small enough to be run by every test run


def flags_of(name: str, images: Path) -> list[str]:
    """main_dino.py's flags of a recorded run on the images of `write_images`, without --output_dir."""
    return [*_COMMON, *RUNS[name][0], "--data_path", str(images)]


def write_images(folder: Path, per_class: int = 4) -> Path:
    """The first built-in images of each class as PNG files, 48 pixels wide; does nothing if they are there."""
    from PIL import Image

    from data.datasets import open_images

    if folder.is_dir():
        return folder
    source, seen = open_images("demo:48", "train"), {}
    for i in range(len(source)):
        label = int(source.labels[i])
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= per_class:
            place = folder / "train" / source.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.load(i)).save(place / f"{seen[label]}.png")
    return folder


def machine() -> dict[str, Any]:
    """What the bits of a run depend on, besides the code."""
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model")))
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        processor += " with AMX" if "amx_tile" in flags else ""
    except (OSError, StopIteration):
        pass
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor,
        "threads": 1,
    }


# ------------------------------------------------------------------------------------------------ running


def run(name: str, folder: Path, checkout: Path, images: Path) -> None:
    """Run `name` with the programs of `checkout` into `folder`. Raises RuntimeError if it fails."""
    flags, world = flags_of(name, images), RUNS[name][1]
    command = [sys.executable, "main_dino.py", *flags, "--output_dir", str(folder)]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    if world > 1:
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    ranks = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        ranks.append(
            subprocess.Popen(
                command, cwd=checkout, env=base | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"{name} failed in {checkout}:\n{''.join(outputs)[-4000:]}")


def continue_run(name: str, middle: Path, folder: Path, checkout: Path, images: Path) -> None:
    """Continue the checkpoint `middle` of a run to its end, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(middle, folder / "checkpoint.pth")
    run(name, folder, checkout, images)


def summary(folder: Path) -> dict[str, Any]:
    """Losses by step, and the hash of the final state."""
    losses = scalars(folder, "train/loss")
    return {"losses": [losses[step] for step in sorted(losses)], "sha256": state_hash(folder / "checkpoint.pth")}


def state_hash(path: Path) -> str:
    """SHA-256 over the names and bytes of everything that trains: models, optimizer, center, counters."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    digest = hashlib.sha256()
    for key in ("student", "teacher", "dino_loss", "optimizer", "epoch", "iteration"):
        _add(digest, key, content[key])
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            _add(digest, f"{name}.{key}", value[key])
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _add(digest, f"{name}.{i}", item)
    elif isinstance(value, torch.Tensor):
        digest.update(name.encode() + str(value.dtype).encode() + str(tuple(value.shape)).encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    else:
        digest.update(f"{name}={value!r};".encode())


# ------------------------------------------------------------------------------------------------ the program


def record(output: Path, checkout: Path, names: list[str], images: Path) -> dict[str, Any]:
    """Run everything; leaves `output/record.json` and `output/NAME/middle.pth`."""
    runs = {}
    for name in names:
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        run(name, folder, checkout, images)
        runs[name] = summary(folder)
        (folder / f"checkpoint_step{MIDDLE:08d}.pth").rename(output / f"{name}.middle.pth")
        shutil.rmtree(folder)
        print(f"{name:28} {runs[name]['sha256'][:16]}  last loss {runs[name]['losses'][-1]:.6f}", flush=True)
    content = {"machine": machine(), "runs": runs}
    (output / "record.json").write_text(json.dumps(content, indent=1) + "\n")
    return content


def compare(mine: dict[str, Any], other: Path, output: Path, checkout: Path) -> int:
    """Print what differs from the record in `other`; continue its middle checkpoints. Returns the differences."""
    theirs = json.loads((other / "record.json").read_text())
    if theirs["machine"] != mine["machine"]:
        print(f"recorded on another machine: {theirs['machine']}, here {mine['machine']}; bits may differ")
    differences = 0
    for name, here in mine["runs"].items():
        there = theirs["runs"][name]
        folder = output / f"{name}.continued"
        shutil.rmtree(folder, ignore_errors=True)
        continue_run(name, other / f"{name}.middle.pth", folder, checkout, other / "images")
        results = {
            "losses": here["losses"] == there["losses"],
            "state": here["sha256"] == there["sha256"],
            "continued": state_hash(folder / "checkpoint.pth") == there["sha256"],
        }
        shutil.rmtree(folder)
        differences += not all(results.values())
        print(f"{name:28} " + "  ".join(f"{key} {'equal' if ok else 'DIFFERS'}" for key, ok in results.items()))
    print(f"{differences} of {len(mine['runs'])} runs differ")
    return differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the record")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose main_dino.py runs")
    parser.add_argument("--against", type=Path, help="a record to compare with")
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), default=list(RUNS), help="some of the runs")
    parser.add_argument("--write_golden", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.output is None:
        parser.error("--output is missing: the folder of the record")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    images = write_images((args.against or output).resolve() / "images")
    mine = record(output, args.checkout.resolve(), args.only, images)
    if args.write_golden:
        kept = {name: mine["runs"][name] for name in _IN_THE_TREE}
        GOLDEN.write_text(json.dumps([{"machine": mine["machine"], "runs": kept}], indent=1) + "\n")
    return 1 if args.against and compare(mine, args.against.resolve(), output, args.checkout.resolve()) else 0


if __name__ == "__main__":
    sys.exit(main())
