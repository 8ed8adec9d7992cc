"""Faults of decoding, crops, colours and draws."""

from __future__ import annotations

from tests.mutate import of_file

TRAIN_SET = "tests/data/test_train_set.py"
AUGMENT = "tests/data/test_augment.py"
COLOUR = "tests/data/test_colour.py"
SCALES = f"{TRAIN_SET}::test_crops_have_the_published_scales_and_half_are_flipped"
PROBABILITIES = f"{AUGMENT}::test_colour_parameters_have_the_published_probabilities"

MUTATIONS = [
    *of_file(
        "data/augment.py",
        ("never_flipped", "row[-1] < spec.flip", "False", SCALES),
        ("large_crops_from_a_half", "[spec.global_scale] * spec", "[(0.5, 1.0)] * spec", SCALES),
        ("crops_all_square", "ratio = math.exp(low + (high - low) * draws[2 * t + 1])", "ratio = 1.0",
         f"{AUGMENT}::test_boxes_lie_in_the_image_and_have_torchvisions_distribution"),
        ("decoded_too_small", "reduction >= 2 * s", "reduction >= s",
         f"{TRAIN_SET}::test_a_jpeg_is_decoded_smaller_only_if_every_crop_is_still_halved_after_it"),
        ("colours_in_one_order", "np.argsort(u[..., 5:9], axis=-1)", "np.arange(4)", PROBABILITIES),
        ("second_crop_as_a_local_one", "kind = np.where(views < spec.global_number,",
         "kind = np.where(views < 1,", PROBABILITIES),
        ("always_jittered", "jitter = u[..., 0] < spec.jitter", "jitter = u[..., 0] < 1", PROBABILITIES),
        ("hue_one_way", "spec.hue * (2 * u[..., 4] - 1)", "spec.hue * u[..., 4]", PROBABILITIES),
    ),
    *of_file(
        "data/colour.py",
        ("solarized_from_a_quarter", "torch.ge(x, WHITE / 2,", "torch.ge(x, WHITE / 4,",
         f"{COLOUR}::test_gray_and_solarize_touch_only_the_chosen_crops"),
        ("red_mean_of_another_set", "IMAGENET_STD = (0.485,", "IMAGENET_STD = (0.507,",
         f"{COLOUR}::test_training_crops_are_normalised_as_torchvisions_models_want_it"),
        ("deviations_of_another_order", "(0.229, 0.224, 0.225)", "(0.225, 0.224, 0.229)",
         f"{COLOUR}::test_training_crops_are_normalised_as_torchvisions_models_want_it"),
        ("hue_always_first", "(operations == HUE).argmax(axis=1))", "0)",
         f"{COLOUR}::test_jitter_runs_in_each_crops_own_order"),
        ("gray_weights_of_bgr", "(0.299, 0.587, 0.114)", "(0.114, 0.587, 0.299)",
         f"{COLOUR}::test_gray_and_solarize_touch_only_the_chosen_crops"),
        ("blur_too_narrow", "torch.exp(-0.5 * (taps", "torch.exp(-1.0 * (taps",
         f"{COLOUR}::test_blur_is_a_gaussian_of_each_crops_own_sigma"),
    ),
    *of_file(
        "data/decode.py",
        ("no_pixel_limit_for_plain_jpegs", " and 0 < height * width <= MAX_PIXELS", " and 0 < height * width",
         "tests/data/test_decode.py::test_a_plain_jpeg_of_too_many_pixels_is_refused"),
    ),
    *of_file(
        "data/eval_set.py",
        ("evaluation_decodes_too_small", "short >= 2 * s * resize_to", "short >= s * resize_to",
         f"{TRAIN_SET}::test_evaluation_decodes_smaller_by_the_same_rule"),
    ),
    *of_file(
        "data/train_set.py",
        ("substitute_always_the_first", "(words % np.uint64(len(self.source)))", "(words * np.uint64(0))",
         f"{TRAIN_SET}::test_substitutes_are_spread_over_the_good_images"),
    ),
    *of_file(
        "data/draws.py",
        ("crops_of_all_epochs_alike", "counter=[0, epoch, index, 0]", "counter=[0, 0, index, 0]",
         "tests/data/test_sampler.py::test_draws_are_uniform_and_differ_by_every_counter"),
    ),
    *of_file(
        "data/loader.py",
        ("evaluation_pixels_up_to_256", "1 / (255 * s)", "1 / (256 * s)",
         "tests/data/test_loader.py::test_normalize_is_to_tensor_and_normalize"),
    ),
]  # fmt: skip
