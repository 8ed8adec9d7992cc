"""Weighted k-nearest-neighbour classification of frozen features (DINO's protocol), and its low-shot form (AttMask's).

A query f votes with its k nearest training features f_i, by cosine similarity s_i = <f, f_i> of L2-normalised features:
score(c) = sum over the k of exp(s_i / T) [y_i = c]. Top-1 is the class of the largest score; top-5 asks whether the
label is among the first min(5, k) classes.

Departures from the published code, results unchanged:
- one pass over the similarities serves every k and every temperature: the neighbours of the largest k are sorted, and
  a smaller k is a prefix of them; votes are scattered instead of summed over a (queries, k, classes) one-hot array;
- memory is bounded by `chunk_bytes`, whatever the number of queries, training images or classes (the published chunk
  is a hundredth of the queries, and empty below a hundred);
- the number of classes comes from the labels, and a class without any vote never counts as retrieved;
- over ranks, the training features stay where they were extracted: each rank finds neighbours in its own shard, and
  the shards' neighbours are merged. No rank ever holds the whole training set.

Letters: n training images, q queries, D width, k neighbours, C classes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.sampler import shard_for_eval
from evaluation import features
from runtime.distributed import all_gather_objects, get_rank, get_world_size, is_dist_avail_and_initialized
from runtime.guards import InputError
from runtime.terminal import say

CHUNK_BYTES = 128 << 20  # bound of each large temporary: a block of training features, a chunk of similarities
LOW_SHOT_STARTS = {1: (0, 5, 10, 15, 20), 5: (0, 5, 10, 15, 20), 10: (0, 10, 20, 30, 40), 20: (0, 20, 40, 60, 80)}

Accuracies = dict[tuple[int, float], tuple[float, float]]


class Neighbours(NamedTuple):
    """The k nearest training images of each query, nearest first."""

    similarity: Tensor  # (q, k) float32; -inf where a shard had fewer than k images
    label: Tensor  # (q, k) int64


@functools.cache
def fastest_exact_precision(device_type: str) -> str:
    """The fastest float32 matmul setting whose products have fp32-level error here.

    "medium" takes another CPU library, about twice as fast and as exact, except on processors with AMX, where it
    multiplies in bf16 (measured error 6e-4 on unit vectors, which reorders neighbours). TF32 on a GPU does likewise.
    """
    if device_type != "cpu":
        return "highest"
    generator = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(64, 384, generator=generator), dim=1)
    b = F.normalize(torch.randn(512, 384, generator=generator), dim=1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (a @ b.T - a.double() @ b.double().T).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    return "medium" if error < 2e-6 else "highest"


@contextlib.contextmanager
def exact_fp32_matmul(device: torch.device) -> Iterator[None]:
    """Inside, float32 products have float32's error, whatever faster setting the program runs under."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(fastest_exact_precision(device.type))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def row_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` along the rows of a matrix. On CPU in two stages: half the time for wide rows.

    Columns fall into groups of m. The k largest entries lie in at most k groups, and these are among the k groups of
    largest maxima; so only k·m entries are ranked.
    """
    m = 16
    width = values.shape[1]
    groups = width // m
    if values.device.type != "cpu" or groups < 2 * k:
        return values.topk(k)
    best = values[:, : groups * m].unflatten(1, (m, groups)).amax(1).topk(k, sorted=False).indices  # (rows, k)
    columns = (best[:, None, :] + groups * torch.arange(m)[:, None]).flatten(1)  # (rows, m * k)
    if groups * m < width:
        columns = torch.cat([columns, torch.arange(groups * m, width).expand(len(values), -1)], dim=1)
    top, index = values.gather(1, columns).topk(k)
    return top, columns.gather(1, index)


def nearest(
    train_features: Tensor, train_labels: Tensor, queries: Tensor, k: int, chunk_bytes: int = CHUNK_BYTES
) -> Neighbours:
    """The k nearest of `train_features` (n, D) for each of `queries` (q, D), in fp32 from fp32 or fp16 storage.

    Training features pass once, block by block; for each block the queries pass chunk by chunk, and the best k so far
    are kept. Work is done on the device of the queries. With n < k the missing neighbours have similarity -inf.
    """
    n, dim = train_features.shape
    q, device = len(queries), queries.device
    similarity = torch.full((q, k), -torch.inf, device=device)
    label = torch.zeros((q, k), dtype=torch.int64, device=device)
    block = max(1, min(n, chunk_bytes // (4 * dim)))
    rows = max(1, min(q, chunk_bytes // (4 * block)))
    with exact_fp32_matmul(device):
        for start in range(0, n, block):
            keys = train_features[start : start + block].to(device, torch.float32)
            key_labels = train_labels[start : start + block].to(device)
            for first in range(0, q, rows):
                chunk = slice(first, first + rows)
                found, index = row_topk(queries[chunk].float() @ keys.T, min(k, len(keys)))  # (rows, k)
                found_labels = key_labels[index]
                if start:  # merge with the blocks before
                    found = torch.cat([similarity[chunk], found], dim=1)
                    found_labels = torch.cat([label[chunk], found_labels], dim=1)
                    found, index = found.topk(min(k, found.shape[1]))
                    found_labels = found_labels.gather(1, index)
                similarity[chunk, : found.shape[1]] = found
                label[chunk, : found.shape[1]] = found_labels
    return Neighbours(similarity, label)


def count_hits(
    neighbours: Neighbours, targets: Tensor, ks: Sequence[int], temperatures: Sequence[float], num_classes: int
) -> Tensor:
    """Number of queries hit at top-1 and at top-5, for every k and temperature: (len(ks), len(temperatures), 2)."""
    similarity, label = neighbours
    hits = torch.zeros(len(ks), len(temperatures), 2, dtype=torch.float64)
    # exp(s / T) overflows at small T: the largest is taken out, which scales all of a query's scores alike
    relative = similarity - similarity[:, :1]
    for t, temperature in enumerate(temperatures):
        weight = (relative / temperature).exp()
        scores = torch.zeros(len(targets), num_classes, device=similarity.device)
        done = 0
        for i in sorted(range(len(ks)), key=lambda i: ks[i]):  # a larger k adds its further neighbours
            scores.scatter_add_(1, label[:, done : ks[i]], weight[:, done : ks[i]])
            done = ks[i]
            best, classes = scores.topk(min(5, ks[i], num_classes))
            hit = (classes == targets[:, None]) & (best > 0)
            hits[i, t, 0] = hit[:, 0].sum().item()
            hits[i, t, 1] = hit.sum().item()
    return hits


def _chunks(total: int, rows: int) -> Iterator[slice]:
    for start in range(0, total, rows):
        yield slice(start, min(total, start + rows))


def _vote_rows(num_classes: int, k: int, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // (4 * max(num_classes, 4 * k)))


def _check(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    for name, rows, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if rows.ndim != 2 or len(rows) != len(labels):
            raise ValueError(
                f"{name} features of shape {tuple(rows.shape)} with {len(labels)} labels: "
                "k-NN takes one row of features per label"
            )
        if len(labels) and int(labels.min()) < 0:
            raise ValueError(f"{name} labels hold {int(labels.min())}: class labels count from 0")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train features have width {train_features.shape[1]} and test features {test_features.shape[1]}: "
            "both must come from the same model"
        )
    if not len(test_features):
        raise ValueError("k-NN was given no test features")


def clamp_ks(ks: Sequence[int], n: int) -> list[int]:
    """The distinct k of `ks`, those above `n` training images lowered to n, and said so."""
    bad = [k for k in ks if k < 1]
    if bad or not ks:
        raise ValueError(f"k-NN needs at least one k, each of 1 or more; got {list(ks)}")
    if n < 1:
        raise ValueError("k-NN was given no training features")
    too_large = [k for k in ks if k > n]
    if too_large:
        say(f"k-NN: k = {', '.join(map(str, too_large))} exceeds the {n} training images; using k = {n} instead")
    return list(dict.fromkeys(min(k, n) for k in ks))


def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int | None = None,
    *,
    sharded: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Accuracies:
    """{(k, temperature): (top-1, top-5)} in percent, from one pass over the similarities. SPEC of the votes: above.

    Features (n, D) and (q, D) are L2-normalised already, labels (n,) and (q,). A k above n is clamped, with a message.
    `sharded`: every rank calls with its own part of the training features and with all of the test features; all get
    the same answer. Without it nothing is communicated.
    """
    _check(train_features, train_labels, test_features, test_labels)
    device = test_features.device
    sharded = sharded and is_dist_avail_and_initialized() and get_world_size() > 1
    targets = test_labels.to(device, torch.int64)
    labels = train_labels.to(torch.int64)
    total = torch.tensor([len(labels)], device=device)
    top_label = torch.tensor([max(int(labels.max()) if len(labels) else 0, int(targets.max()))], device=device)
    if sharded:
        dist.all_reduce(total)
        dist.all_reduce(top_label, op=dist.ReduceOp.MAX)
    ks = clamp_ks(ks, int(total))
    if num_classes is not None and int(top_label) >= num_classes:
        raise ValueError(
            f"labels go up to {int(top_label)}, beyond num_classes={num_classes}; leave it out to count them"
        )
    num_classes = max(int(top_label) + 1, num_classes or 0)

    neighbours = nearest(train_features, labels, test_features, max(ks), chunk_bytes)
    hits = torch.zeros(len(ks), len(temperatures), 2, dtype=torch.float64)
    for i, chunk in enumerate(_chunks(len(targets), _vote_rows(num_classes, max(ks), chunk_bytes))):
        part = Neighbours(neighbours.similarity[chunk], neighbours.label[chunk])
        if sharded:
            part = _merge_ranks(part)
            if i % get_world_size() != get_rank():  # the ranks share the counting of votes
                continue
        hits += count_hits(part, targets[chunk], ks, temperatures, num_classes)
    if sharded:
        hits = hits.float().to(device)  # counts of images: exact in float32 up to 16 million
        dist.all_reduce(hits)
    percent = (100.0 * hits.double().cpu() / len(targets)).tolist()
    return {
        (k, temperature): tuple(percent[i][t]) for i, k in enumerate(ks) for t, temperature in enumerate(temperatures)
    }


def _merge_ranks(part: Neighbours) -> Neighbours:
    """The k nearest over all ranks' shards of the training set, from each rank's own k nearest."""
    k = part.similarity.shape[1]
    gathered = []
    for tensor in part:
        pieces = [torch.empty_like(tensor) for _ in range(get_world_size())]
        dist.all_gather(pieces, tensor.contiguous())
        gathered.append(torch.cat(pieces, dim=1))  # (rows, k * world)
    similarity, index = gathered[0].topk(k)
    return Neighbours(similarity, gathered[1].gather(1, index))


def knn_classifier(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int | Sequence[int],
    T: float,
    num_classes: int | None = None,
) -> tuple[float, float] | dict[int, tuple[float, float]]:
    """(top-1, top-5) in percent of weighted k-NN, or {k: (top-1, top-5)} for a sequence of k, in one pass.

    DINO's signature. Features are L2-normalised already; no rank communicates. A k above the number of training images
    is clamped with a message, and stands in the result under the clamped value.
    """
    ks = [k] if isinstance(k, int) else list(k)
    results = knn_accuracies(train_features, train_labels, test_features, test_labels, ks, [T], num_classes)
    by_k = {key[0]: value for key, value in results.items()}
    return next(iter(by_k.values())) if isinstance(k, int) else by_k


def low_shot_indices(
    labels: Tensor | np.ndarray, nu: int, start: int | None, seed: int = 0, classes: Sequence[str] | None = None
) -> Tensor:
    """Indices of `nu` images of each class: those from `start` in file order, or, with start None, a seeded draw.

    Raises InputError naming the first class that has too few images.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng([seed, nu])
    chosen = []
    for c in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == c)
        needed = nu if start is None else start + nu
        if len(members) < needed:
            name = f"{classes[c]!r}" if classes else str(c)
            remedy = "lower --low_shot" if len(members) < nu else "lower --low_shot or take --low_shot_draw random"
            raise InputError(
                f"class {name} has {len(members)} training images; nu = {nu}"
                + (f" from image {start} on" if start else "")
                + f" needs {needed}: {remedy}"
            )
        chosen.append(rng.choice(members, nu, replace=False) if start is None else members[start : start + nu])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def low_shot_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    nus: Sequence[int] = (1, 5, 10, 20),
    T: float = 0.07,
    draw: str = "files",
    runs: int = 5,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    *,
    sharded: bool = False,
) -> dict[int, dict]:
    """Low-shot k-NN: nu training images per class, k = 1 for nu = 1 and 20 otherwise, mean top-1 over 5 runs.

    `draw` "files" follows AttMask: file order from the starts of LOW_SHOT_STARTS (other nu: 0, nu, 2 nu ...);
    "random": seeded draws, run r from seed + r. Returns {nu: {"k", "runs": [top-1 ...], "mean", "std"}}, the sample
    standard deviation over the runs.
    `sharded`: every rank calls with all features, classifies its share of the queries, and gets the same answer.
    """
    if draw not in ("files", "random"):
        raise ValueError(f"low-shot draw must be 'files' or 'random', got {draw!r}")
    world = get_world_size() if sharded else 1
    share = shard_for_eval(len(test_labels), get_rank() if sharded else 0, world)
    mine = slice(share[0], share[-1] + 1) if len(share) else slice(0)
    hits: dict[int, list[int]] = {}
    for nu in nus:
        if nu < 1:
            raise ValueError(f"low-shot k-NN needs at least one image per class, got nu = {nu}")
        starts = LOW_SHOT_STARTS.get(nu, tuple(nu * r for r in range(runs)))
        hits[nu] = []
        for run in range(runs if draw == "random" else len(starts)):
            start = None if draw == "random" else starts[run]
            index = low_shot_indices(train_labels, nu, start, seed + run, classes)
            if len(share):
                part = (test_features[mine], test_labels[mine])
                k = min(_low_shot_k(nu), len(index))
                top1, _ = knn_classifier(train_features[index], train_labels[index], *part, k, T)
                hits[nu].append(round(top1 * len(share) / 100))
            else:  # more ranks than queries
                hits[nu].append(0)
    results = {}
    everywhere = all_gather_objects(hits) if world > 1 else [hits]
    for nu in nus:
        top1 = (100 * np.sum([of_rank[nu] for of_rank in everywhere], axis=0) / len(test_labels)).tolist()
        spread = float(np.std(top1, ddof=1))
        results[nu] = {"k": _low_shot_k(nu), "runs": top1, "mean": float(np.mean(top1)), "std": spread}
    return results


def _low_shot_k(nu: int) -> int:
    return 1 if nu == 1 else 20


def evaluate(
    model: torch.nn.Module,
    train_source,
    val_source,
    ks: Sequence[int] = (10, 20, 100, 200),
    T: float = 0.07,
    *,
    device: torch.device | None = None,
    img_size: int = 224,
    resize: int | None = None,
    batch_size: int = 128,
    num_workers: int = 4,
    amp_dtype: torch.dtype | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[int, tuple[float, float]]:
    """k-NN of a model on two labelled image sources: {k: (top-1, top-5)}. All ranks take part, and all get the answer.

    The model is put in eval mode and returned to the mode it was in. Raises features.Interrupted, on all ranks, where
    `should_stop` said so on any of them before its features were there.
    """
    settings = {
        "img_size": img_size,
        "resize": resize,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "device": device,
        "amp_dtype": amp_dtype,
        "show_progress": False,
        "should_stop": should_stop,
    }
    features.require_labels(train_source, val_source)
    shares = None
    with contextlib.suppress(features.Interrupted):
        shares = [features.extract_shard(model, source, **settings) for source in (train_source, val_source)]
    if not all(all_gather_objects(shares is not None)):
        raise features.Interrupted
    (train, index), (test_share, _) = shares
    test = features.gather_shards(test_share, len(val_source))
    if device is not None and device.type == "cuda":
        test = test.to(device)
    results = knn_accuracies(
        features.normalize_rows_(train),
        torch.as_tensor(train_source.labels)[index],
        features.normalize_rows_(test),
        torch.as_tensor(val_source.labels),
        ks,
        [T],
        sharded=True,
    )
    return {k: accuracy for (k, _), accuracy in results.items()}


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Percentage of rows of `output` (B, C) whose `target` (B,) is among the k largest, for each k (DINO's name)."""
    ranked = output.topk(min(max(topk), output.shape[1])).indices
    hits = ranked == target[:, None]
    return [100.0 * hits[:, :k].any(dim=1).float().mean() for k in topk]
