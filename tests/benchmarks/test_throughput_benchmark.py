"""Images per second: both ways are measured, and every setting has its row."""

from __future__ import annotations

import torch

from benchmarks import throughput

TINY = "--img_size 32 --patch_size 8 --embed_dim 24 --depth 2 --num_heads 2 --out_dim 64 --local_crops_size 16"


def test_every_setting_has_a_row(capsys, monkeypatch):
    """Models times precisions, with rates above 0; a setting that does not fit does not stop the others."""
    measure = throughput.measure

    def out_of_memory_at_first(setting, *args):
        if setting.precision == "bf16":
            raise torch.OutOfMemoryError("no memory")
        return measure(setting, *args)

    monkeypatch.setattr(throughput, "measure", out_of_memory_at_first)
    flags = ["--arch", "vit_tiny", "--precision", "bf16", "fp32", "--batch_size", "2", "--steps", "1",
             "--device", "cpu", "--num_workers", "0", "--flags", TINY]  # fmt: skip
    assert throughput.main(flags) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| vit_tiny")]
    assert rows[0][4] == "does not fit"
    assert float(rows[1][4]) >= 0
    assert rows[1][6].endswith("%")


def test_the_loader_feeds_new_images():
    """Batches for the fed side differ from each other and go on beyond an epoch."""
    args = throughput.main_dino.parse_arguments(
        ["--arch", "vit_tiny", "--data_path", "demo", "--batch_size_per_gpu", "512", "--device", "cpu", *TINY.split()]
    )
    source = throughput.open_images("demo:32", "train", subset=32)
    run = throughput.main_dino.build(args, len(source), torch.device("cpu"))
    feed = throughput.batches(run, source, torch.device("cpu"), 0)
    first, second = (next(feed).crops[0] for _ in range(2))
    assert first.shape == second.shape
    assert not torch.equal(first, second)
