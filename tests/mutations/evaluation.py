"""Faults of the linear probe, logistic regression and k-NN."""

from __future__ import annotations

from tests.mutate import of_file

PROBE = "tests/evaluation/test_linear.py"
PROBE_CROPS = "tests/evaluation/test_crops.py"
LOGISTIC = "tests/evaluation/test_logistic.py"
KNN = "tests/evaluation/test_knn.py"

MUTATIONS = [
    *of_file(
        "evaluation/crops.py",
        ("probe_labels_by_position", "self.source.labels[images]", "self.source.labels[[p for _, p in pairs]]",
         f"{PROBE_CROPS}::test_labels_are_those_of_the_images_and_not_of_their_positions"),
        ("probe_never_flipped", "draws[-1] < 0.5", "False", f"{PROBE_CROPS}::test_half_of_the_crops_are_flipped"),
        ("probe_crops_from_a_half", "SCALE = (0.08, 1.0)", "SCALE = (0.5, 1.0)",
         f"{PROBE_CROPS}::test_crops_cover_from_a_twelfth_of_the_image_to_all_of_it"),
    ),
    *of_file(
        "evaluation/linear.py",
        ("probe_cosine_flat", "return 0.5 * (1 + math.cos(math.pi * epoch / epochs))", "return 1.0",
         f"{PROBE}::test_rates_are_scaled_by_the_global_batch_and_follow_a_cosine"),
        ("probe_rate_not_scaled", "peaks = [lr * global_batch / 256.0 for lr in lrs]", "peaks = list(lrs)",
         f"{PROBE}::test_rates_are_scaled_by_the_global_batch_and_follow_a_cosine"),
        ("probe_without_momentum", "MOMENTUM = 0.9", "MOMENTUM = 0.0",
         f"{PROBE}::test_a_head_follows_torch_sgd_with_momentum"),
    ),
    *of_file(
        "eval_linear.py",
        ("probe_without_its_cosine", "plan.recipe.scales(epoch, args.epochs, sampler.steps_per_epoch)", "1.0",
         "tests/test_eval_linear.py::test_rates_follow_the_cosine_of_the_epochs"),
        ("head_selected_on_val", '"held-out", held_out) if choose else val', '"held-out", held_out) '
         "and val if choose else val", "tests/test_eval_linear.py::test_the_head_is_chosen_on_what_was_asked[train]"),
    ),
    *of_file(
        "evaluation/sweep.py",
        ("leader_by_val", '"selection_top1": s[0]', '"selection_top1": v[0]',
         "tests/evaluation/test_sweep.py::test_the_best_head_is_the_one_of_the_selection_and_not_of_val"),
    ),
    *of_file(
        "evaluation/logistic.py",
        ("penalty_chosen_on_its_training_part", "_top(train[held_out], labels[held_out], start)",
         "_top(train[keep], labels[keep], start)",
         f"{LOGISTIC}::test_the_penalty_is_scored_on_images_that_it_was_not_fitted_on"),
        ("test_set_standardised_by_itself", "fitted.standardise(test_features.to(device))",
         "((test_features - test_features.mean(0)) / test_features.std(0))",
         f"{LOGISTIC}::test_the_test_set_is_standardised_as_the_training_set_is"),
    ),
    *of_file(
        "evaluation/knn.py",
        ("knn_without_temperature", "(relative / temperature).exp()", "relative.exp()",
         f"{KNN}::test_matches_the_published_accuracies"),
        ("knn_votes_counted_twice", "label[:, done : ks[i]], weight[:, done : ks[i]]",
         "label[:, : ks[i]], weight[:, : ks[i]]", f"{KNN}::test_many_k_and_temperatures_equal_one_at_a_time"),
        ("knn_top5_of_six", "scores.topk(min(5, ks[i], num_classes))", "scores.topk(min(6, ks[i], num_classes))",
         f"{KNN}::test_matches_the_published_accuracies"),
        ("knn_hits_without_votes", " & (best > 0)", "", f"{KNN}::test_a_class_without_votes_is_never_a_hit"),
        ("knn_features_not_normalised", "features.normalize_rows_(train.features)", "train.features",
         f"{KNN}::test_an_evaluation_compares_directions_and_not_lengths"),
        ("knn_labels_by_position", "[features.gather_shards(val.index)]", "[: len(test)]",
         f"{KNN}::test_an_evaluation_while_training_skips_bad_files"),
    ),
    *of_file(
        "evaluation/neighbours.py",
        ("knn_first_rank_only", "similarity, index = gathered[0].topk(k)",
         "similarity, index = gathered[0][:, :k].topk(k)",
         "tests/evaluation/test_neighbours.py::test_shards_of_all_ranks_are_merged"),
        ("knn_labels_of_the_first_rank", "gathered[1].gather(1, index))", "gathered[1][:, :k])",
         "tests/evaluation/test_neighbours.py::test_shards_of_all_ranks_are_merged"),
        ("knn_last_block_only", "if start:", "if False:", f"{KNN}::test_memory_chunks_do_not_change_the_result"),
    ),
]  # fmt: skip
