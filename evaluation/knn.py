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
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from data.source import ImageSource
from evaluation import features
from evaluation.neighbours import CHUNK_BYTES, Neighbours, merge_ranks, nearest
from runtime.distributed import all_gather_objects, get_rank, get_world_size, is_dist_avail_and_initialized
from runtime.terminal import say

Accuracies = dict[tuple[int, float], tuple[float, float]]


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
            part = merge_ranks(part)
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


def evaluate(
    model: torch.nn.Module,
    train_source: ImageSource,
    val_source: ImageSource,
    ks: Sequence[int] = (10, 20, 100, 200),
    T: float = 0.07,
    *,
    device: torch.device | None = None,
    img_size: int = 224,
    resize: int | None = None,
    batch_size: int = 128,
    num_workers: int = 4,
    amp_dtype: torch.dtype | None = None,
    on_bad_image: str = "skip",
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[int, tuple[float, float]]:
    """k-NN of a model on two labelled image sources: {k: (top-1, top-5)}. All ranks take part, and all get the answer.

    The model is put in eval mode and returned to the mode it was in. This is the evaluation of a run under way, so a
    file that can't be used is left out, and the output says how many were; on_bad_image "raise" stops at it instead.
    Raises features.Interrupted, on all ranks, if `should_stop` said so on any of them before its features were there.
    """
    settings = {
        "img_size": img_size,
        "resize": resize,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "device": device,
        "amp_dtype": amp_dtype,
        "show_progress": False,
        "on_bad_image": on_bad_image,
        "should_stop": should_stop,
    }
    features.require_labels(train_source, val_source)
    shares = None
    with contextlib.suppress(features.Interrupted):
        shares = [features.extract_shard(model, source, **settings) for source in (train_source, val_source)]
    if not all(all_gather_objects(shares is not None)):
        raise features.Interrupted
    train, val = shares
    if on_bad_image == "skip":
        features.report_skipped(train_source, train.bad, "training")
        features.report_skipped(val_source, val.bad, "validation")
    test = features.gather_shards(val.features)
    if device is not None and device.type == "cuda":
        test = test.to(device)
    results = knn_accuracies(
        features.normalize_rows_(train.features),
        torch.as_tensor(train_source.labels)[train.index],
        features.normalize_rows_(test),
        torch.as_tensor(val_source.labels)[features.gather_shards(val.index)],
        ks,
        [T],
        len(train_source.classes),
        sharded=True,
    )
    return {k: accuracy for (k, _), accuracy in results.items()}


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Percentage of rows of `output` (B, C) whose `target` (B,) is among the k largest, for each k (DINO's name)."""
    ranked = output.topk(min(max(topk), output.shape[1])).indices
    hits = ranked == target[:, None]
    return [100.0 * hits[:, :k].any(dim=1).float().mean() for k in topk]
