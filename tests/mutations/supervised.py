"""Faults of supervised training: its step, its data, its groups, its validation."""

from __future__ import annotations

from tests.mutate import of_file

STEP = "tests/test_supervised_step.py"
PLAIN = f"{STEP}::test_the_step_is_the_plain_one[0.8]"
REFUSED = f"{STEP}::test_a_refused_step_changes_nothing"
LABELLED = "tests/data/test_labelled_set.py"
VALIDATION = "tests/training/test_validation.py::test_results_are_those_of_all_images_at_once"
GROUPS = "tests/optim/test_groups.py::test_rates_fall_by_a_factor_per_block"

MUTATIONS = [
    *of_file(
        "main_supervised.py",
        ("average_follows_a_refused_step", "model_ema_decay, skip=refused)", "model_ema_decay)", REFUSED),
        ("average_without_its_decay", "run.args.model_ema_decay, skip", "0.0, skip", PLAIN),
        ("layer_decay_forgotten", "layer_decay=args.layer_decay)", "layer_decay=1.0)", PLAIN),
        ("targets_not_smoothed", "mode=args.mixup_mode, label_smoothing=args.smoothing,",
         "mode=args.mixup_mode, label_smoothing=0.0,", PLAIN),
        ("statistics_not_averaged", "groups, average_buffers=True)", "groups)",
         "tests/test_main_supervised.py::test_the_average_has_its_statistics"),
    ),
    *of_file(
        "data/labelled_set.py",
        ("label_of_the_broken_image", "self.source.labels[used]", "self.source.labels[image]",
         f"{LABELLED}::test_a_substitute_brings_its_own_label"),
        ("seeds_without_the_epoch", "seed_generators(self.seed, TRANSFORM, epoch, index)",
         "seed_generators(self.seed, TRANSFORM, 0, index)", f"{LABELLED}::test_epochs_seeds_and_repetitions_differ"),
        ("first_split_erased", "if self._erase is None or (split == 0 and not self.spec.erase_first_split):",
         "if self._erase is None:", f"{LABELLED}::test_splits_lie_one_after_the_other_and_the_first_is_clean"),
        ("first_split_augmented", "image if clean else self._augment(image)", "self._augment(image)",
         f"{LABELLED}::test_splits_lie_one_after_the_other_and_the_first_is_clean"),
        ("rectangles_of_other_images", "split * count + b", "split + b * spec.splits",
         f"{LABELLED}::test_splits_lie_one_after_the_other_and_the_first_is_clean"),
        ("generators_left_seeded", "with generators_restored():", "if True:",
         f"{LABELLED}::test_the_process_draws_on_as_if_nothing_had_happened"),
    ),
    *of_file(
        "data/sampler.py",
        ("repetitions_alike", "+ repetition * self.num_samples", "+ 0 * repetition",
         "tests/data/test_sampler.py::test_repetitions_share_a_step_and_count_on"),
    ),
    *of_file(
        "optim/groups.py",
        ("rates_fall_the_wrong_way", "layer_decay ** (top - layers[name])", "layer_decay ** layers[name]", GROUPS),
        ("embeddings_decayed", 'or name.rpartition(".")[2] in no_decay', "",
         "tests/optim/test_groups.py::test_layered_groups_without_layer_decay_are_timms"),
    ),
    *of_file(
        "optim/average.py",
        ("counters_follow_a_refused_step", "source if skip is None else torch.where(skip, target, source)", "source",
         "tests/optim/test_average.py::test_buffers_follow_if_asked"),
    ),
    *of_file(
        "training/validation.py",
        ("not_in_eval_mode", "with eval_mode(model), run.hardware", "with run.hardware", VALIDATION),
        ("top5_for_top1", "hit[:, 0].float().sum(), hit.float().sum()", "hit.float().sum(), hit.float().sum()",
         VALIDATION),
        ("broken_images_counted", 'total = len(val) - report_skipped(', 'total = len(val) - 0 * report_skipped(',
         "tests/training/test_validation.py::test_a_broken_image_is_left_out_and_said"),
    ),
    *of_file(
        "training/loop.py",
        ("any_epoch_is_the_best", "and score > self.best)", ")",
         "tests/test_main_supervised.py::test_the_best_checkpoint_is_that_of_the_best_average"),
    ),
]  # fmt: skip
