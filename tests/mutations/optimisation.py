"""Faults of the optimizers, parameter groups, clipping and averages; on an accelerator too (_gpu)."""

from __future__ import annotations

from tests.mutate import of_file

STEP = "tests/training/test_step.py"
OPTIM = "tests/optim"
AVERAGE = f"{OPTIM}/test_average.py"
PLAIN = f"{STEP}::test_the_step_is_the_plain_one[sgd]"
PLAIN_ADAMW = f"{STEP}::test_the_step_is_the_plain_one[adamw]"
PLAIN_LARS = f"{STEP}::test_the_step_is_the_plain_one[lars]"
ACCELERATOR = f"{STEP}::test_the_step_of_an_accelerator_is_the_plain_one[sgd]"
ACCELERATOR_LARS = f"{STEP}::test_the_step_of_an_accelerator_is_the_plain_one[lars]"
COSINES = f"{OPTIM}/test_schedules.py::test_cosine_schedules"

MUTATIONS = [
    *of_file(
        "optim/schedules.py",
        ("warmup_a_step_long", "base_value, warmup) if", "base_value, warmup + 1)[:-1] if", COSINES),
        ("cosine_a_step_short", "max(1, len(steps))", "max(1, len(steps) - 1)", COSINES),
        ("cosine_ends_at_zero", "final_value + 0.5 * (base", "0.5 * (base", COSINES),
    ),
    *of_file(
        "optim/optimizers.py",
        ("adam_for_adamw", "torch.optim.AdamW(groups, fused=True)", "torch.optim.Adam(groups, fused=True)",
         PLAIN_ADAMW),
        ("sgd_without_momentum", "lr=0.0, momentum=0.9", "lr=0.0, momentum=0.0", PLAIN),
    ),
    *of_file(
        "optim/groups.py",
        ("vectors_decay", " or parameter.ndim == 1", "", f"{OPTIM}/test_groups.py::test_groups"),
        ("biases_decay", '"params": not_regularised, "weight_decay": 0.0}', '"params": not_regularised}',
         f"{OPTIM}/test_groups.py::test_groups"),
    ),
    *of_file(
        "optim/lars.py",
        ("lars_without_momentum", 'torch._foreach_mul_(momenta, group["momentum"])', "torch._foreach_zero_(momenta)",
         PLAIN_LARS),
        ("lars_without_momentum_gpu", 'mu * group["momentum"] + update', "update", ACCELERATOR_LARS),
        ("lars_step_not_refused_gpu", "torch.where(skip, torch.zeros_like(mu), mu)", "mu",
         f"{OPTIM}/test_optimizers.py::test_a_refused_step_changes_nothing"),
        ("lars_ratio_upside_down", "p_norms / u_norms", "u_norms / p_norms",
         f"{OPTIM}/test_lars.py::test_lars_four_steps"),
        ("lars_adapts_vectors", "if p.ndim != 1]", "]", f"{OPTIM}/test_lars.py::test_lars_four_steps"),
    ),
    *of_file(
        "optim/average.py",
        ("average_with_the_wrong_weight", "self._student, 1 - momentum)", "self._student, momentum)", PLAIN),
        ("average_with_the_wrong_weight_gpu", "torch.where(skip, 0.0, 1 - momentum)",
         "torch.where(skip, 0.0, momentum)", ACCELERATOR),
        ("average_of_a_refused_step_gpu", "torch.where(skip, 0.0, 1 - momentum)",
         "torch.where(skip, 1 - momentum, 1 - momentum)", f"{AVERAGE}::test_average_with_a_flag"),
    ),
    *of_file(
        "optim/clipping.py",
        ("clipping_does_nothing", "gradient.mul_(factor)", "pass", f"{OPTIM}/test_clipping.py::test_clipping"),
        ("clipping_does_nothing_gpu", "torch._foreach_mul_(gradients, list(factors.unbind()))", "pass", ACCELERATOR),
        ("small_gradients_grow_gpu", ".clamp(max=1.0)", "", ACCELERATOR),
        ("frozen_an_epoch_long", "if epoch >= freeze_last_layer", "if epoch > freeze_last_layer",
         f"{OPTIM}/test_clipping.py::test_last_layer_freeze"),
    ),
    *of_file(
        "optim/norms.py",
        ("sum_of_magnitudes_for_the_norm_gpu", "torch._foreach_norm(tensors)", "torch._foreach_norm(tensors, 1)",
         ACCELERATOR),
        ("norms_of_one_block", "for block in flat.split(BLOCK)]", "for block in flat.split(BLOCK)[:1]]",
         f"{OPTIM}/test_norms.py::test_norms_of_large_gradients_are_exact"),
    ),
    *of_file(
        "optim/batchnorm.py",
        ("statistics_put_back_after_good_steps", "torch.where(where, before, buffer)",
         "torch.where(where, buffer, before)", f"{AVERAGE}::test_running_statistics_are_put_back"),
        ("statistics_noted_without_a_copy", "[buffer.clone() for buffer", "[buffer for buffer",
         f"{AVERAGE}::test_running_statistics_are_put_back"),
    ),
]  # fmt: skip
