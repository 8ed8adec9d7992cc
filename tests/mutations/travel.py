"""Faults of what leaves the checkout: exports, timm's models, the package."""

from __future__ import annotations

from tests.mutate import of_file

TIMM = "tests/exporting/test_for_timm.py"
CALL = f"{TIMM}::test_the_suggested_call_gives_the_checkpoints_features"
MODELS = "tests/test_timm_models.py"

MUTATIONS = [
    *of_file(
        "exporting/for_timm.py",
        ("call_without_the_poolings_settings", "for key, value in changed.items()}  #", "for key, value in ()}  #",
         f"{CALL}[simpool_vit]"),
        ("timm_num_classes_of_features", "0 if classifier is None else len(classifier.bias)", "0",
         f"{TIMM}::test_a_classifier_travels_along[vit]"),
    ),
    *of_file(
        "export.py",
        ("timms_positions_not_baked", 'if args.format in (*GRAPHS, "timm") or size', "if args.format in GRAPHS or size",
         f"{CALL}[simpool_vit]"),
    ),
    *of_file(
        "exporting/graph.py",
        ("logits_of_another_feature", "self.classifier(found[0]))", "self.classifier(2 * found[0]))",
         "tests/test_export.py::test_logits_of_a_graph[torchscript]"),
    ),
    *of_file(
        "portable.py",
        ("classifier_without_bias", '"bias": bias}', '"bias": 0 * bias}',
         "tests/test_portable.py::test_a_classifier_is_added_on_request"),
    ),
    *of_file(
        "timm_models.py",
        ("intermediate_features_without_norm", "x = self.norm(x) if norm else x", "x = x",
         f"{MODELS}::test_intermediate_features[simpool_vit_tiny_patch16_224]"),
        ("strides_of_the_name", "stride = self.conv1.stride[0]", "stride = 2",
         f"{MODELS}::test_strides_of_a_small_stem"),
        ("pruned_too_late", "self.keep_steps(max(taken) + 1)", "self.keep_steps(99)",
         f"{MODELS}::test_features_only[simpool_vit_tiny_patch16_224]"),
    ),
    *of_file(
        "setup.py",
        ("plain_imports_not_prefixed", '_IMPORT.sub(rf"\\1from {PACKAGE} \\2", _FROM.sub(rf"\\1{PACKAGE}.\\2", text))',
         '_FROM.sub(rf"\\1{PACKAGE}.\\2", text)', "tests/test_setup.py::test_our_imports_are_prefixed_and_others_stay"),
    ),
    *of_file(
        "runtime/reproduce.py",
        ("commit_of_another_checkout", 'git("ls-files", "--error-unmatch", __file__)', 'git("--version")',
         "tests/runtime/test_reproduce.py::test_an_installed_copy_does_not_report_the_checkout_around_it"),
    ),
]  # fmt: skip
