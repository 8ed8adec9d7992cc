"""Faults of the loss, the head, SimPool, the pooling of backbones and the vision transformer."""

from __future__ import annotations

from tests.mutate import of_file

STEP = "tests/training/test_step.py"
LOSSES = "tests/distill/test_losses.py"
FUSED = "tests/distill/test_fused_loss.py"
POOLING = "tests/test_sp.py"
VIT = "tests/test_vision_transformer.py"
POOLED = "tests/test_pooled_backbone.py"
PLAIN = f"{STEP}::test_the_step_is_the_plain_one[sgd]"
GOLDEN_LOSS = f"{LOSSES}::test_three_steps_of_the_published_loss"
IN_PLACE = f"{FUSED}::test_in_place_equals_the_sum_over_pairs"
FORMULA = f"{POOLING}::test_equals_the_plain_formula_with_all_gradients"

MUTATIONS = [
    *of_file(
        "distill/losses.py",
        ("center_momentum_reversed", "batch_center * (1 - self.center_momentum)", "batch_center * self.center_momentum",
         GOLDEN_LOSS),
        ("temperature_of_the_next_epoch", "[min(epoch, len(", "[min(epoch + 1, len(", GOLDEN_LOSS),
        ("view_meets_itself", "enumerate(teacher_views) if i != v]", "enumerate(teacher_views) if i == v]",
         GOLDEN_LOSS),
        ("temperature_warmup_a_step_long", "np.linspace(warmup_temp, temp, warmup_epochs)",
         "np.linspace(warmup_temp, temp, warmup_epochs + 1)[:-1]", f"{LOSSES}::test_temperature_schedule_is_clamped"),
        ("center_summed_over_ranks", "(len(teacher_output) * get_world_size())", "len(teacher_output)",
         f"{LOSSES}::test_the_center_is_the_mean_over_two_alike_processes"),
        ("not_centered", "teacher_output.detach().float() - center)", "teacher_output.detach().float())", GOLDEN_LOSS),
    ),
    *of_file(
        "distill/fused_loss.py",
        ("view_meets_itself_in_the_step", "torch.stack((second, first))", "torch.stack((first, second))", IN_PLACE),
        ("entropy_negative", "entropy / (2 * batch), teacher_sum)", "-entropy / (2 * batch), teacher_sum)", IN_PLACE),
        ("local_views_count_once", "like.new_full((views,), 2.0)", "like.new_full((views,), 1.0)", IN_PLACE),
        ("student_not_sharpened", "copy=True).div_(settings.student_temp)", "copy=True)", IN_PLACE),
        ("center_added", "return (raw - center)", "return (raw + center)", PLAIN),
        ("local_gradient_without_its_target", "p[2:] -= mean", "pass", IN_PLACE),
        ("gradient_not_scaled_by_the_loss", ' == "cpu" and grad_loss.item() == 1.0', ' == "cpu"', PLAIN),
    ),
    *of_file(
        "distill/heads.py",
        ("bottleneck_not_normalised", "torch.bfloat16) else x, dim=-1)", "torch.bfloat16) else x, dim=-1, p=1.0)",
         "tests/distill/test_heads.py::test_published_numbers_and_names"),
        ("prototype_norms_trained", "train_scale=not norm_last_layer", "train_scale=True",
         "tests/distill/test_heads.py::test_frozen_norms"),
    ),
    *of_file(
        "sp.py",
        ("pooled_without_its_root", "pooled.pow_(1.0 / settings.gamma)", "pass", FORMULA),
        ("values_not_shifted", "normed.sub_(lowest[0].unsqueeze(-1))", "normed.abs_()", FORMULA),
        ("values_without_eps", "unsqueeze(-1)).add_(VALUE_EPS)", "unsqueeze(-1))", FORMULA),
        ("minimum_of_the_batch", 'unsqueeze(0) if settings.value_min == "batch"', "unsqueeze(0) if True", FORMULA),
        ("beta_left_out", "pooled = pooled + self.beta.to(pooled.dtype)", "pass",
         f"{POOLING}::test_beta_is_added_to_every_feature"),
        ("query_of_the_largest", "source = x.mean(1, dtype=dtype)", "source = x.amax(1).to(dtype)", FORMULA),
        ("minimum_without_gradient", "flat.scatter_add_(1, place, -flat.sum(1, keepdim=True))", "pass", FORMULA),
    ),
    *of_file(
        "pooled_backbone.py",
        ("pooled_before_the_norm_always", "x = self.positions(features)", "x = features",
         f"{POOLED}::test_the_feature_is_operator_and_norm_in_the_order_of_pool_position"),
        ("operators_start_as_the_backbone_does", 'if name != "pool":', "if True:",
         f"{POOLED}::test_operators_keep_their_own_initial_weights"),
        ("beta_after_the_norm_too", 'kind == "tokens" and self.pool_position == "before"', 'kind == "tokens"',
         f"{POOLED}::test_beta_belongs_to_tokens_pooled_before_the_norm"),
        ("maps_without_their_grid", 'settings["grid"] = self.grid_of(features, size)', "pass",
         f"{POOLED}::test_every_pooling_trains_on_every_backbone[vit-cbam]"),
    ),
    *of_file(
        "vision_transformer.py",
        ("positions_without_their_tenth", "(side + 0.1) / own", "side / own",
         f"{VIT}::test_published_numbers_and_names"),
        ("positions_always_resampled", "grid == native and not resamples_always",
         "grid == native and self.mode == 'official'", f"{VIT}::test_position_policies"),
        ("drop_path_without_its_scale", "keep.div_(1 - drop_prob)", "keep", f"{VIT}::test_drop_path_keeps_the_mean"),
        ("norm_with_a_large_eps", "norm_layer=partial(nn.LayerNorm, eps=1e-6)",
         "norm_layer=partial(nn.LayerNorm, eps=1e-3)", f"{VIT}::test_published_numbers_and_names"),
    ),
]  # fmt: skip
