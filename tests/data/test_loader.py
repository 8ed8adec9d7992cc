"""Batches: the same pixels whatever the plumbing, substitutes for broken files, and workers that die loudly."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from data import bad_images
from data.augment import ColourStage, CropSpec
from data.bad_images import BadImages, skipped_line
from data.colour import channel_statistics
from data.datasets import open_images
from data.loader import ahead_on_device, build_eval_loader, build_loader, build_train_loader, normalize
from data.sampler import TrainSampler
from data.train_set import CropBatch, TrainSet
from runtime.guards import InputError, RunStopped
from tests.patience import PATIENCE_S, on_this_machine

SPEC = CropSpec(global_size=32, local_size=16, local_number=2)


@pytest.fixture(scope="module")
def source(cifar10):
    return open_images(cifar10, subset=6)


@pytest.fixture
def broken(cifar10, tmp_path):
    """40 images in two classes, of which numbers 3 and 25 are broken."""
    source = open_images(cifar10, subset=4)
    for i in range(40):
        folder = tmp_path / "broken" / ("a" if i < 20 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        if i in (3, 25):
            (folder / f"{i:02d}.jpg").write_bytes(source.read(i)[:-200])
        else:
            shutil.copy(source.name(i), folder / f"{i:02d}.jpg")
    return open_images(tmp_path / "broken")


def tensors(batch):
    return [*batch.crops, *batch.colour, batch.index, batch.bad]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_batches_have_the_promised_shapes(source):
    """Crops (V, B, C, S, S), parameters (V, B, P), one index and one flag per image."""
    batch = next(iter(build_train_loader(source, SPEC, TrainSampler(len(source), 5))))
    assert [tuple(c.shape) for c in batch.crops] == [(2, 5, 3, 32, 32), (2, 5, 3, 16, 16)]
    assert [c.dtype for c in batch.crops] == [torch.uint8] * 2
    assert [tuple(c.shape[:2]) for c in batch.colour] == [(2, 5), (2, 5)]
    assert batch.index.shape == batch.bad.shape == (5,)
    out = ColourStage(SPEC)(batch.crops, batch.colour)
    assert [tuple(o.shape) for o in out] == [(10, 3, 32, 32), (10, 3, 16, 16)]


def test_the_number_of_workers_does_not_change_a_batch(source):
    """In-process and two-worker loaders give the same bits, epoch after epoch."""
    loaders = [
        build_train_loader(source, SPEC, TrainSampler(len(source), 8, seed=3), num_workers=n, seed=3) for n in (0, 2)
    ]
    for _ in range(2):
        pairs = list(zip(*loaders, strict=True))
        assert len(pairs) == len(source) // 8
        assert all(same(a, b) for a, b in pairs)


def test_a_resumed_loader_gives_the_rest_of_the_epoch(source):
    """From step s of epoch e the batches are those of an uninterrupted run."""
    whole = build_train_loader(source, SPEC, TrainSampler(len(source), 8, seed=1), seed=1)
    list(whole)
    expected = list(whole)[4:]
    sampler = TrainSampler(len(source), 8, seed=1)
    sampler.set_position(1, 4)
    resumed = list(build_train_loader(source, SPEC, sampler, seed=1))
    assert len(resumed) == len(expected) > 0
    assert all(same(a, b) for a, b in zip(resumed, expected, strict=True))


def test_ranks_share_a_global_batch_without_changing_it(source):
    """Two ranks' halves together are the batch of one rank."""
    one = next(iter(build_train_loader(source, SPEC, TrainSampler(len(source), 8, seed=2), seed=2)))
    halves = [
        next(iter(build_train_loader(source, SPEC, TrainSampler(len(source), 4, seed=2, rank=r, world_size=2), seed=2)))
        for r in range(2)
    ]
    joined = CropBatch(
        [torch.cat(c, dim=1) for c in zip(*(h.crops for h in halves), strict=True)],
        [torch.cat(c, dim=1) for c in zip(*(h.colour for h in halves), strict=True)],
        torch.cat([h.index for h in halves]),
        torch.cat([h.bad for h in halves]),
    )
    assert same(joined, one)


def test_a_broken_file_is_replaced_by_the_same_substitute_every_time(broken):
    """The batch marks the broken file; its crops are another image's, the same with any number of workers."""
    pairs = [(0, 3), (0, 25), (0, 4)]
    batch = TrainSet(broken, SPEC, seed=0).__getitems__(pairs)
    assert batch.bad.tolist() == [True, True, False]
    assert batch.index.tolist() == [3, 25, 4]
    assert same(batch, TrainSet(broken, SPEC, seed=0).__getitems__(pairs))
    assert batch.crops[0][:, 0].float().std() > 1


def test_raise_mode_stops_at_the_first_broken_file(broken):
    """--on_bad_image raise: an InputError in one line, naming the file, from a worker as well."""
    for workers in (0, 1):
        loader = build_train_loader(broken, SPEC, TrainSampler(40, 40), num_workers=workers, on_bad_image="raise")
        with pytest.raises(InputError, match=r"(03|25)\.jpg can't be decoded") as caught:
            next(iter(loader))
        message = str(caught.value)
        del caught  # its traceback would keep the worker until a garbage collection
        assert "\n" not in message


def test_bad_files_are_named_once_and_counted_every_epoch(broken):
    """Each broken file gets one line; the epoch's count has every substitution."""
    lines = []
    account = BadImages(broken, max_fraction=0.1, report=lines.append)
    loader = build_train_loader(broken, SPEC, TrainSampler(40, 10))
    for _ in range(2):
        for batch in loader:
            account.see(batch)
        assert account.end_epoch() == 2
    assert len(lines) == 2
    assert any("03.jpg can't be decoded" in line for line in lines)


def test_too_many_bad_files_stop_the_run_with_a_list(broken):
    """Above max_bad_fraction an InputError names the flag and the files; a single one below it does not."""
    account = BadImages(broken, max_fraction=0.03, report=lambda line: None)
    batch = TrainSet(broken, SPEC, 0).__getitems__([(0, 3)])
    account.see(batch)
    with pytest.raises(InputError, match=r"(?s)2 of 40 images.*--max_bad_fraction 0.03.*03\.jpg.*25\.jpg"):
        account.see(TrainSet(broken, SPEC, 0).__getitems__([(0, 25)]))


def test_nothing_but_broken_files_is_an_input_error(tmp_path, broken):
    """Where no substitute can be found the message says that most files are broken."""
    for i in range(40):
        if i != 20:
            with open(broken.name(i), "wb") as file:
                file.write(b"broken")
    os.unlink(broken.name(20))
    with pytest.raises(InputError, match="check_images"):
        TrainSet(broken, SPEC, 0).__getitems__([(0, 3)])


def started(loader: Iterable) -> tuple[Iterator, list[multiprocessing.Process]]:
    """An iterator that has given one batch, and its own workers: those of an earlier test may be on their way out."""
    before = {child.pid for child in multiprocessing.active_children()}
    iterator = iter(loader)
    next(iterator)
    return iterator, [child for child in multiprocessing.active_children() if child.pid not in before]


def test_a_killed_worker_is_a_clear_error_within_ten_seconds(source):
    """SIGKILL on a worker ends the loop with a RuntimeError that names the likely cause."""
    sampler = TrainSampler(len(source), 2)
    iterator, workers = started(build_train_loader(source, SPEC, sampler, num_workers=2, prefetch_factor=1))
    os.kill(workers[0].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RunStopped, match="a loader worker is gone"):
        list(iterator)
    assert time.monotonic() - start < on_this_machine(10)


def test_a_killed_worker_interrupts_nothing_but_the_loader(source):
    """While the training process does something else, a save say, the death of a worker raises nothing there."""
    iterator, (worker,) = started(build_train_loader(source, SPEC, TrainSampler(len(source), 2), num_workers=1))
    os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(RunStopped, match="a loader worker is gone"):
        list(iterator)


def test_an_error_in_a_worker_is_not_taken_for_a_lost_one(source, monkeypatch):
    """A bug in the data set comes out as itself."""

    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TrainSet, "use", fail)
    with pytest.raises(RuntimeError, match="a bug") as caught:
        next(iter(build_train_loader(source, SPEC, TrainSampler(len(source), 2), num_workers=1)))
    assert not isinstance(caught.value, RunStopped)
    del caught


def test_workers_leave_signals_to_the_training_process(source):
    """SIGTERM, SIGINT and SIGUSR1 from elsewhere change nothing for a worker: the epoch comes to its end."""
    loader = build_train_loader(source, SPEC, TrainSampler(len(source), 4), num_workers=1)
    iterator, workers = started(loader)
    for worker in workers:
        for name in ("TERM", "INT", "USR1"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert 1 + sum(1 for _ in iterator) == len(source) // 4


def test_batches_ahead_on_a_device_are_the_same_batches(source):
    """Moving ahead keeps order and content."""
    sampler = TrainSampler(len(source), 8)
    plain = list(build_train_loader(source, SPEC, sampler))
    sampler.set_position(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moved = ahead_on_device(build_train_loader(source, SPEC, sampler, pin_memory=device.type == "cuda"), device)
    for a, b in zip(plain, moved, strict=True):
        assert b.crops[0].device.type == device.type
        assert same(a, b.to("cpu"))


def test_eval_loader_is_torchvisions_resize_and_center_crop(imagenet_sample):
    """Pixels equal Resize(256, bicubic) and CenterCrop(224) on the same files, within rounding; every index once."""
    from PIL import Image
    from torchvision import transforms as T

    source = open_images(imagenet_sample)
    transform = T.Compose([T.Resize(256, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(224)])
    seen = []
    for images, index in build_eval_loader(source, 7, indices=np.arange(20)):
        seen += index.tolist()
        for image, i in zip(images, index.tolist(), strict=True):
            expected = np.asarray(transform(Image.open(source.name(i)).convert("RGB"))).astype(int)
            difference = abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
            assert difference.mean() < 0.2
            assert difference.max() <= 10
    assert seen == list(range(20))


def test_eval_loader_names_a_broken_file(broken):
    """Evaluation stops at a broken file: every image counts."""
    with pytest.raises(InputError, match=r"03\.jpg.*evaluation leaves no image out"):
        list(build_eval_loader(broken, 8, img_size=32, resize=32))
    with pytest.raises(InputError, match="resize to 32 or more"):
        build_eval_loader(broken, 8, img_size=32, resize=16)


def test_normalize_is_to_tensor_and_normalize():
    """uint8 images become torchvision's normalised floats, in the dtype asked for."""
    from torchvision.transforms import functional as TF

    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    expected = TF.normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(normalize(images), expected, rtol=1e-5, atol=1e-5)
    assert normalize(images, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("change", [{"num_workers": -1}, {"on_bad_image": "ignore"}])
def test_impossible_loaders_are_input_errors(source, change):
    """A negative number of workers or an unknown mode is refused by its flag."""
    with pytest.raises(InputError, match=next(iter(change))):
        build_train_loader(source, SPEC, TrainSampler(len(source), 4), **change)


def test_the_training_process_can_end_its_workers(source):
    """SIGTERM from the parent ends a worker at once, so that no exit waits for one."""
    _iterator, (worker,) = started(build_train_loader(source, SPEC, TrainSampler(len(source), 4), num_workers=1))
    worker.terminate()
    worker.join(PATIENCE_S)
    assert worker.exitcode == 0


class Squares(Dataset):
    """A data set of no images: numbers and their squares; 7 is bad input."""

    def __len__(self):
        return 100

    def __getitems__(self, numbers):
        if 7 in numbers:
            raise InputError("7 is odd")
        values = torch.tensor(numbers)
        return values, [values**2]


@pytest.mark.parametrize("workers", [0, 1])
def test_any_data_set_that_makes_whole_batches_can_be_loaded(workers):
    """build_loader keeps the order and structure of batches, and hands on an InputError as one line."""
    iterator = iter(build_loader(Squares(), [[1, 2], [3], [7, 8]], num_workers=workers))
    for expected in ([1, 2], [3]):
        values, (squares,) = next(iterator)
        assert values.tolist() == expected
        assert squares.tolist() == [v * v for v in expected]
    with pytest.raises(InputError, match=r"^7 is odd$") as caught:
        next(iterator)
    del caught


def test_full_shared_memory_is_a_clear_error(source, monkeypatch):
    """A worker that finds no room in /dev/shm ends the run with advice, not with torch's traceback."""

    def full(*_):
        raise RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(RunStopped, match=r"/dev/shm.*--num_workers") as caught:
        next(iter(build_train_loader(source, SPEC, TrainSampler(len(source), 2), num_workers=1)))
    del caught


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_during_training_skips_bad_files_and_shows_which(broken, workers):
    """on_bad_image="skip": all images but the broken ones come, under their own indices, with the usual pixels."""
    loader = build_eval_loader(
        broken, 5, workers, img_size=32, resize=32, indices=[3, 0, 25, 1, 2, 3, 25], on_bad_image="skip"
    )
    batches = list(loader)
    assert [index.tolist() for _, index in batches] == [[0, 1, 2], []]
    assert batches[1][0].shape == (0, 3, 32, 32)
    alone = next(iter(build_eval_loader(broken, 3, img_size=32, resize=32, indices=[0, 1, 2])))
    assert torch.equal(batches[0][0], alone[0])
    line = skipped_line(broken, [3, 25], most=1)
    assert "2 of the 40 images" in line
    assert "03.jpg can't be decoded" in line
    assert line.endswith("and 1 more)")
    with pytest.raises(InputError, match="on_bad_image ignore"):
        build_eval_loader(broken, 5, on_bad_image="ignore")


def test_bad_files_of_other_ranks_are_named_by_rank_0_at_the_end_of_the_epoch(broken, monkeypatch):
    """Only rank 0 writes: its own bad files at once, those that others met at the end of the epoch, each once."""
    lines = []
    account = BadImages(broken, max_fraction=0.5, report=lines.append)
    account.see(TrainSet(broken, SPEC, 0).__getitems__([(0, 3)]))
    assert len(lines) == 1
    monkeypatch.setattr(bad_images, "all_gather_objects", lambda mine: [mine, (2, [3, 25])])
    assert account.end_epoch() == 3
    assert account.end_epoch() == 2
    assert [line for line in lines if "25.jpg" in line] == lines[1:]
    assert len(lines) == 2
    monkeypatch.setattr(bad_images, "is_main_process", lambda: False)
    other = BadImages(broken, max_fraction=0.5, report=lines.append)
    other.see(TrainSet(broken, SPEC, 0).__getitems__([(0, 3)]))
    assert len(lines) == 2


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_normalising_keeps_the_channels(channels):
    """As the colour stage of training: ImageNet's statistics for three channels, their averages otherwise."""
    images = torch.randint(256, (2, channels, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in channel_statistics(channels, None, None))
    torch.testing.assert_close(normalize(images), (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
