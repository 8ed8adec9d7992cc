"""The order of samples: a pure function of (seed, epoch), cut into steps, ranks and micro-batches."""

import numpy as np
import pytest

from data.draws import permutation, uniforms
from data.sampler import TrainSampler, shard_for_eval
from runtime.guards import InputError


def indices(sampler):
    return [[i for _, i in batch] for batch in sampler]


def test_epoch_sees_every_image_at_most_once_and_all_that_fill_whole_steps():
    """An epoch visits distinct images, as many as fill whole global steps."""
    seen = [i for batch in indices(TrainSampler(103, 5, seed=3)) for i in batch]
    assert len(seen) == len(set(seen)) == 100


def test_order_changes_with_epoch_and_seed_and_is_repeatable():
    """The order is the same for the same (seed, epoch) and another for any other."""
    sampler = TrainSampler(64, 4, seed=1)
    first, second = indices(sampler), indices(sampler)
    sampler.set_position(0)
    assert indices(sampler) == first
    assert second != first
    assert indices(TrainSampler(64, 4, seed=2)) != first


@pytest.mark.parametrize(("batch", "accum", "world"), [(24, 1, 1), (6, 1, 4), (3, 2, 4), (4, 6, 1), (2, 3, 4)])
def test_a_step_holds_the_same_images_however_it_is_divided(batch, accum, world):
    """With a fixed global batch, a step's images and their order don't depend on ranks or micro-batches."""
    parts = [indices(TrainSampler(100, batch, accum, seed=5, rank=r, world_size=world)) for r in range(world)]
    steps = [
        [i for part in parts for micro in part[s * accum : (s + 1) * accum] for i in micro] for s in range(100 // 24)
    ]
    assert steps == indices(TrainSampler(100, 24, seed=5))


def test_repetitions_share_a_step_and_count_on():
    """Each image of a step is there `repeats` times, the n-th time as index + n * images; steps stay as many.

    Divided among ranks and micro-batches the step is the same.
    """
    whole = indices(TrainSampler(100, 24, seed=5, repeats=3))
    assert len(whole) == 100 // 24
    for step in whole:
        assert sorted(i // 100 for i in step) == [0] * 8 + [1] * 8 + [2] * 8
        images = [i % 100 for i in step]
        assert all(images.count(image) == 3 for image in images)
    assert len({i % 100 for step in whole for i in step}) == 4 * 8
    parts = [indices(TrainSampler(100, 6, 2, seed=5, rank=r, world_size=2, repeats=3)) for r in range(2)]
    assert [[i for part in parts for micro in part[2 * s : 2 * s + 2] for i in micro] for s in range(4)] == whole


def test_position_within_an_epoch_continues_as_if_never_stopped():
    """Starting at step s yields exactly the rest of the epoch, then the next epoch."""
    sampler = TrainSampler(50, 4, accum=2, seed=0)
    whole, following = list(sampler), list(sampler)
    sampler.set_position(0, 3)
    assert len(sampler) == len(whole) - 6
    assert list(sampler) == whole[6:]
    assert list(sampler) == following


def test_pairs_carry_their_epoch():
    """Each index comes with the epoch that its crops are drawn for."""
    sampler = TrainSampler(8, 4)
    sampler.set_position(7)
    assert {epoch for batch in sampler for epoch, _ in batch} == {7}


def test_fewer_images_than_a_global_batch_is_an_input_error_with_both_numbers():
    """Too few images for one step: the message names the images, the batch and the flag."""
    with pytest.raises(InputError, match=r"10 images.*global batch of 16.*--batch_size_per_gpu"):
        TrainSampler(10, 4, accum=2, world_size=2)


@pytest.mark.parametrize("call", [{"batch_size": 0}, {"batch_size": 2, "accum": 0}, {"batch_size": 2, "rank": 1}])
def test_impossible_divisions_are_input_errors(call):
    """Batch size, micro-batches and rank are checked where they enter."""
    with pytest.raises(InputError):
        TrainSampler(10, **call)


@pytest.mark.parametrize(("count", "world"), [(10, 3), (7, 7), (3, 5), (2000, 16)])
def test_evaluation_shards_cover_every_index_once(count, world):
    """The ranks' shares are disjoint, in order, and together the whole: no padding."""
    shares = [shard_for_eval(count, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(shares), np.arange(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_draws_are_uniform_and_differ_by_every_counter():
    """Numbers for neighbouring seeds, epochs, indices and purposes are unrelated, and uniform in [0, 1)."""
    base = uniforms(4000, 0, 1, 0, 0)
    assert base.min() >= 0
    assert base.max() < 1
    assert np.histogram(base, bins=10, range=(0, 1))[0] == pytest.approx(400, abs=80)
    for other in (
        uniforms(4000, 1, 1, 0, 0),
        uniforms(4000, 0, 2),
        uniforms(4000, 0, 1, 1),
        uniforms(4000, 0, 1, 0, 1),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.06


def test_order_is_pinned():
    """The order of seed 0, epoch 0 is this one: a change of it would break the resume of running jobs."""
    assert permutation(8, 0, 0).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
