"""Faults of AttMask: its step, its masks, its patch loss."""

from __future__ import annotations

from tests.mutate import of_file

STEP = "tests/test_main_attmask.py"
PUBLISHED = f"{STEP}::test_five_published_steps"
LEAN = f"{STEP}::test_the_lean_step_is_the_formula"
DRAWS = f"{STEP}::test_the_masks_of_a_step_do_not_depend_on_ranks_or_micro_batches"
ROWS = "tests/distill/test_masked_rows.py"

MUTATIONS = [
    *of_file(
        "main_attmask.py",
        ("patch_center_of_a_refused_step", 'means["center2"], skip=refused)', 'means["center2"])',
         f"{STEP}::test_a_refused_step_changes_nothing"),
        ("center_over_images", "crops_of_teacher = run.loss.ngcrops * run", "crops_of_teacher = run", PUBLISHED),
        ("teacher_not_averaged", 'schedules["teacher_momentum"][step]), skip', "args.lr) * 0 + 1.0, skip", PUBLISHED),
        ("prototypes_never_frozen", "cancel_gradients_last_layer(epoch, run.student,",
         "cancel_gradients_last_layer(99, run.student,", PUBLISHED),
        ("patches_by_default_apart", "args.patch_out_dim, args.sources[\"patch_out_dim\"] = args.out_dim,",
         "args.out_dim, args.sources[\"patch_out_dim\"] = args.out_dim,",
         f"{STEP}::test_a_shared_head_decides_the_number_of_patch_prototypes"),
    ),
    *of_file(
        "training/masking.py",
        ("ratio_without_its_variance", "self.variances[pair] * (2 * where - 1)", "0 * where", DRAWS),
        ("masks_of_every_epoch", "raw_words(3 * crops, self.seed, MASKS, epoch, index)",
         "raw_words(3 * crops, self.seed, MASKS, 0, index)", f"{STEP}::test_drawn_masks_differ_between_epochs"),
        ("noise_of_every_epoch", "uniforms(crops * (1 + noise), self.seed, MASKS, epoch, index)",
         "uniforms(crops * (1 + noise), self.seed, MASKS, 0, index)", DRAWS),
        ("masks_too_early", "if epoch >= settings.start_epoch else (0.0, 0.0)", "",
         f"{LEAN}[before the first masks]"),
    ),
    *of_file(
        "distill/masked_multicrop.py",
        ("weights_of_all_rows", "hidden.sum(dim=1, keepdim=True).clamp(min=1) * total", "most * total",
         f"{LEAN}[hint, two heads]"),
        ("student_sees_everything", "mask = masks.mask if hasattr", "mask = None if hasattr", PUBLISHED),
        ("attention_of_one_head", "attention.float().mean(dim=1)", "attention.float()[:, 0]", PUBLISHED),
    ),
    *of_file(
        "distill/heads.py",
        ("center_of_the_masked", "rows.unflatten(0, patches.shape[:2]).mean(dim=1).sum(dim=0)",
         "rows.mean(dim=0) * len(patches) * 1.01", PUBLISHED),
    ),
    *of_file(
        "distill/masked_rows.py",
        ("target_without_center", "(teacher[part].to(dtype) - center)", "(teacher[part].to(dtype) + 0 * center)",
         f"{ROWS}::test_value_and_gradient_are_the_formulas"),
        ("loss_without_weights", "((q * log_p).sum(-1) * weights[part]).sum()", "((q * log_p).sum(-1)).sum()",
         f"{ROWS}::test_value_and_gradient_are_the_formulas"),
        ("half_gradients_unscaled", "mul_(HALF_UNIT if half else slopes[part])", "mul_(1 if half else slopes[part])",
         f"{ROWS}::test_half_precision_keeps_small_gradients"),
    ),
    *of_file(
        "distill/patch_loss.py",
        ("lambdas_exchanged", "cls, patch = self.lambda1 * cls, self.lambda2 * patch\n        return cls + patch, cls",
         "cls, patch = self.lambda2 * cls, self.lambda1 * patch\n        return cls + patch, cls",
         f"{LEAN}[hint, two heads]"),
    ),
]  # fmt: skip
