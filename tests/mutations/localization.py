"""Faults of localisation, discovery and ImageNet-9."""

from __future__ import annotations

from tests.mutate import of_file

FORMATS = "tests/data/test_boxes_formats.py"
BOXES = "tests/data/test_boxes.py"
SEARCH = "tests/evaluation/test_level_search.py"
MAPS = "tests/evaluation/test_object_maps.py"
PROGRAM = "tests/test_eval_localization.py"

MUTATIONS = [
    *of_file(
        "data/boxes_formats.py",
        ("voc_counted_from_zero", "boxes.append((x0 - 1, y0 - 1, x1, y1))", "boxes.append((x0, y0, x1, y1))",
         f"{FORMATS}::test_voc_counts_from_one_and_keeps_difficult_objects"),
        ("coco_crowds_kept", 'if annotation.get("iscrowd"):', "if False:",
         f"{FORMATS}::test_coco_corners_are_rounded_half_to_even"),
        ("coco_rounded_before_the_sum", "round(x + width)", "round(x) + round(width)",
         f"{FORMATS}::test_coco_corners_are_rounded_half_to_even"),
        ("doctype_accepted", "parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse", "",
         f"{FORMATS}::test_hostile_xml_is_refused_by_name"),
    ),
    *of_file(
        "data/boxes.py",
        ("outside_accepted", "_SLACK = 1.0", "_SLACK = 1e9", f"{BOXES}::test_what_cannot_be_used_is_named_or_skipped"),
        ("truths_of_the_next_image", "self.corners[self.starts[i] : self.starts[i + 1]]",
         "self.corners[self.starts[i] : self.starts[i + 1] + 1]",
         f"{BOXES}::test_sizes_come_from_the_pictures_if_the_boxes_do_not_tell"),
    ),
    *of_file(
        "evaluation/level_search.py",
        ("overlap_above_the_limit_only", "overlap >= limit / 100", "overlap > limit / 100 + 0.05",
         f"{SEARCH}::test_curves_are_the_published_ones_for_all_and_for_some"),
        ("all_images_in_every_part", "if chosen is None or chosen[i]:", "if True:",
         f"{SEARCH}::test_curves_are_the_published_ones_for_all_and_for_some"),
    ),
    *of_file(
        "evaluation/object_maps.py",
        ("lost_compares_queries", "chunk(3, dim=-1)[1]", "chunk(3, dim=-1)[0]",
         f"{MAPS}::test_keys_are_those_of_the_last_block_without_cls"),
        ("padded_in_front", "F.pad(image, (0, -width % step, 0, -height % step))",
         "F.pad(image, (-width % step, 0, -height % step, 0))",
         f"{MAPS}::test_zeros_are_added_to_the_right_and_below"),
        ("stage_not_dilated", "convolution.dilation, convolution.padding = (2, 2), (2, 2)", "pass",
         f"{MAPS}::test_a_dilated_stage_has_the_plain_map_at_every_second_position"),
    ),
    *of_file(
        "evaluation/discover.py",
        ("boxes_not_scaled_back", "np.array(sight.box) * scale", "np.array(sight.box)",
         f"{PROGRAM}::test_larger_images_are_resized_and_boxes_scaled_back"),
    ),
    *of_file(
        "evaluation/imagenet9.py",
        ("other_classes_counted", "torch.full((IMAGENET_CLASSES,), -1, dtype=torch.int64)",
         "torch.full((IMAGENET_CLASSES,), 0, dtype=torch.int64)",
         "tests/evaluation/test_imagenet9.py::test_370_of_the_thousand_classes_belong_to_one_of_the_nine"),
    ),
]  # fmt: skip
