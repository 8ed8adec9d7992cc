"""Faults of the training step, the schedules, and what a run continues from."""

from __future__ import annotations

from tests.mutate import of_file

STEP = "tests/training/test_step.py"
RUN = "tests/training/test_run.py"
PLAIN = f"{STEP}::test_the_step_is_the_plain_one[sgd]"
REFUSED = f"{STEP}::test_a_refused_step_changes_nothing"
STATE = "tests/training/test_state.py"
LOOP = "tests/training/test_loop.py"

MUTATIONS = [
    *of_file(
        "main_dino.py",
        ("teacher_momentum_early", '["teacher_momentum"][step]', '["teacher_momentum"][min(step + 1, 9)]', PLAIN),
        ("center_over_b", "center=run.loss.nglobal * run", "center=run", PLAIN),
        ("center_not_moved", 'apply_center(means["center"]', "apply_center(run.loss.center", PLAIN),
        ("temperature_by_step", "teacher_output, epoch)", "teacher_output, step)", PLAIN),
        ("last_layer_not_frozen", "run.args.freeze_last_layer)", "0)", PLAIN),
        ("fp16_gradients_never_unscaled", "    run.unscale()", "    pass",
         f"{STEP}::test_a_loss_scale_leaves_no_trace"),
        ("teacher_follows_a_refused_step", "[step]), skip=refused)", "[step]))", REFUSED),
        ("center_follows_a_refused_step", 'means["center"], skip=refused)', 'means["center"])', REFUSED),
        ("drop_path_in_the_teacher", "teacher_backbone = build_backbone(args)",
         "teacher_backbone = build_backbone(args, drop_path_rate=args.drop_path_rate)",
         "tests/test_main_dino.py::test_student_and_teacher_share_the_pooling"),
    ),
    *of_file(
        "training/run.py",
        ("accumulated_gradients_not_divided", "scale(loss / accum)", "scale(loss)", PLAIN),
        ("decay_scheduled_for_all", 'for i, group in enumerate(grouped) if "weight_decay" not in group]',
         "for i, group in enumerate(grouped)]", PLAIN),
        ("rate_late", 'self.schedules["lr"][step])', 'self.schedules["lr"][max(0, step - 1)])', PLAIN),
        ("rate_not_scaled_by_the_batch", "scale = plan.global_batch / 256", "scale = 1.0", PLAIN),
        ("decay_reversed", "(args.weight_decay, args.weight_decay_end,", "(args.weight_decay_end, args.weight_decay,",
         PLAIN),
        ("epoch_early", "return step // self.plan.steps_per_epoch", "return (step + 1) // self.plan.steps_per_epoch",
         PLAIN),
        ("fp16_gradients_left_scaled", "self.scaler.unscale_(self.optimizer)",
         "[self.scaler.unscale_(self.optimizer)] + [p.grad.mul_(self.scaler.get_scale()) for p in "
         "self.student.parameters() if p.grad is not None]", f"{STEP}::test_a_loss_scale_leaves_no_trace"),
        ("not_clipped", "clip_each_(gradients, self.args.clip_grad)", "clip_each_(gradients, 0.0)", PLAIN),
        ("largest_norm_for_the_whole", "return norms.norm(), refused", "return norms.max(), refused", PLAIN),
        ("old_gradients_kept", "self.optimizer.zero_grad(set_to_none=True)", "pass", PLAIN),
        ("means_not_over_micro_batches", "torch.cat(flat) / self._added", "torch.cat(flat)", PLAIN),
        ("infinite_gradients_taken", "~(means.finite() & norms.isfinite().all())", "~means.finite()",
         f"{RUN}::test_what_is_not_finite_refuses_a_step"),
        ("infinite_loss_taken", "~(means.finite() & norms.isfinite().all())", "~norms.isfinite().all()",
         f"{RUN}::test_what_is_not_finite_refuses_a_step"),
        ("refusal_not_told_to_the_optimizer", "self.optimizer.found_inf = refused.float()", "pass",
         f"{RUN}::test_a_refused_step_changes_nothing"),
        ("statistics_of_a_refused_step_kept", "self._statistics.restore(self._before, where=refused)", "pass",
         f"{RUN}::test_a_refused_step_changes_nothing"),
        ("statistics_of_the_teacher_forgotten", "*([self.teacher] if self.teacher is not None else [])", "*[]",
         f"{RUN}::test_a_refused_step_leaves_the_teachers_statistics"),
        ("gradients_exchanged_too_early", "DistributedDataParallel) and not now", "DistributedDataParallel) and now",
         f"{RUN}::test_gradients_are_exchanged_in_the_last_backward_only"),
        ("means_summed_over_ranks", "self._shared /= get_world_size()", "pass",
         f"{RUN}::test_means_over_two_alike_processes_are_those_of_one"),
        ("first_micro_batch_for_the_last", "last=i + 1 == len(batches)", "last=i == 0",
         f"{RUN}::test_the_last_micro_batch_is_marked"),
        ("draws_of_all_ranks_alike", "seed_step(self.args.seed, step, self.plan.rank)",
         "seed_step(self.args.seed, step, 0)", f"{RUN}::test_a_steps_draws_are_those_of_its_number_and_rank"),
    ),
    *of_file(
        "runtime/reproduce.py",
        ("draws_of_all_steps_alike", "SeedSequence([seed, step, rank])", "SeedSequence([seed, rank])",
         "tests/runtime/test_reproduce.py::test_seeds"),
    ),
    *of_file(
        "data/sampler.py",
        ("ranks_overlap", "self.rank * per_rank", "self.rank * self.batch_size",
         "tests/data/test_sampler.py::test_a_step_holds_the_same_images_however_it_is_divided"),
    ),
    *of_file(
        "training/state.py",
        ("loss_scale_forgotten", 'run.scaler.load_state_dict(state["fp16_scaler"])', "pass",
         f"{STATE}::test_a_state_is_loaded_whole"),
        ("center_forgotten", "run.loss.load_state_dict(state[method.loss_key])", "pass",
         f"{STATE}::test_a_state_is_loaded_whole"),
        ("moments_forgotten", 'sharding.load_optimizer(run.optimizer, state["optimizer"])', "pass",
         f"{STATE}::test_a_state_is_loaded_whole"),
        ("teacher_from_the_student", 'sharding.load_model(run.teacher, state["teacher"])',
         'sharding.load_model(run.teacher, without_prefix(state["student"], "module."))',
         f"{STATE}::test_a_state_is_loaded_whole"),
    ),
    *of_file(
        "training/loop.py",
        ("meters_forgotten", 'self.meters.load_state_dict(state["meters"])', "pass",
         f"{LOOP}::test_a_loop_continues_where_its_state_stood"),
        ("steps_of_the_epoch_repeated", 'state["epoch"], state["iteration"]',
         'state["epoch"], state["epoch"] * self.run.plan.steps_per_epoch',
         f"{LOOP}::test_a_loop_continues_where_its_state_stood"),
        ("epoch_forgotten", 'self.epoch, self.step = state["epoch"]', 'self.epoch, self.step = 0 * state["epoch"]',
         f"{LOOP}::test_a_loop_continues_where_its_state_stood"),
        ("refused_steps_forgotten", 'self.refused.in_a_row = state["bad_in_a_row"]', "pass",
         f"{LOOP}::test_a_loop_continues_where_its_state_stood"),
        ("first_images_again", "self.sampler.set_position(self.epoch, first)",
         "self.sampler.set_position(self.epoch, 0)", f"{LOOP}::test_an_epoch_goes_on_with_its_own_images"),
    ),
    *of_file(
        "runtime/meters.py",
        ("meters_without_their_count", 'self._total, self._count = state["total"], state["count"]',
         'self._total, self._count = state["total"], 1', "tests/runtime/test_meters.py::test_meters"),
    ),
    *of_file(
        "runtime/json_log.py",
        ("row_of_the_repeated_epoch_kept", "epoch < first_epoch", "epoch <= first_epoch",
         "tests/runtime/test_json_log.py::test_rows_ahead_of_the_checkpoint_are_cut"),
        ("row_twice", " and epoch not in seen", "",
         "tests/runtime/test_json_log.py::test_rows_ahead_of_the_checkpoint_are_cut"),
    ),
    *of_file(
        "torchfile/read.py",
        ("seal_not_checked", "if digest.hexdigest().encode() != comment[len(COMMENT) :]:", "if False:",
         "tests/runtime/test_checkpoint.py::test_every_flipped_bit_that_changes_content_is_found[60]"),
    ),
]  # fmt: skip
