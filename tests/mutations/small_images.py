"""Faults around small images: the stem, the colours, one global crop, the teacher's momentum."""

from __future__ import annotations

from tests.mutate import of_file

MULTICROP = "tests/training/test_multicrop.py"
DISTILLATION = "tests/training/test_self_distillation.py"
BACKBONE = "tests/training/test_backbone.py"

MUTATIONS = [
    *of_file(
        "training/backbone.py",
        ("older_runs_get_a_small_stem", 'begun_with.get("stem", FORMER_DEFAULTS["stem"])',
         'begun_with.get("stem", args.stem)',
         f"{BACKBONE}::test_a_run_from_before_there_was_a_choice_goes_on[the checkpoint alone]"),
    ),
    *of_file(
        "timm_stem.py",
        ("small_stem_with_strides", "convolution.stride = (1, 1)", "pass",
         "tests/test_timm_stem.py::test_a_small_stem_keeps_the_images_size"),
    ),
    *of_file(
        "pretrained.py",
        ("stem_not_read_from_the_kernel", '"small" if tuple(weights["conv1.weight"].shape[2:]) == (3, 3)',
         '"small" if False', "tests/test_pretrained.py::test_the_stem_of_a_resnet"),
    ),
    *of_file(
        "training/multicrop.py",
        ("solarized_first", "solarize=(0.0, args.solarize_prob, 0.0)", "solarize=(args.solarize_prob, 0.0, 0.0)",
         f"{MULTICROP}::test_every_flag_reaches_the_augmentation"),
    ),
    *of_file(
        "training/self_distillation.py",
        ("teacher_momentum_never_rises", "(args.momentum_teacher, args.momentum_teacher_end,",
         "(args.momentum_teacher, args.momentum_teacher,", f"{DISTILLATION}::test_the_momentum_rises_to_its_end"),
        ("momentum_always_to_one", "args.momentum_teacher_end, args.epochs", "1.0, args.epochs",
         f"{DISTILLATION}::test_the_momentum_rises_to_its_end"),
    ),
    *of_file(
        "training/frozen.py",
        ("statistics_drift_while_frozen", "backbone.train(released)", "backbone.train(True)",
         "tests/training/test_frozen.py::test_a_frozen_backbone_is_exactly_unchanged[batchnorm]"),
        ("frozen_an_epoch_too_long", "epoch >= run.args", "epoch > run.args",
         "tests/training/test_frozen.py::test_nothing_is_computed_backwards_through_a_frozen_backbone"),
    ),
    *of_file(
        "main_dino.py",
        ("center_of_two_crops_always", "center=run.loss.nglobal * run", "center=2 * run",
         "tests/training/test_step.py::test_the_step_of_one_global_crop"),
    ),
]  # fmt: skip
