"""Faults of the attentive probes."""

from __future__ import annotations

from tests.mutate import of_file

PROBES = "tests/poolings/test_probes.py"
EFFICIENT = "tests/poolings/test_efficient.py"
SCORED = "tests/poolings/test_multiple_instance.py"
GOLDEN = f"{PROBES}::test_published_numbers"
FAMILIES = "tests/evaluation/test_probe_families.py"
PROGRAM = "tests/test_eval_linear_probes.py"

MUTATIONS = [
    *of_file(
        "poolings/queries.py",
        ("folded_query_not_scaled", " * (query.shape[0] // heads) ** -0.5", "", f"{GOLDEN}[aim]"),
        ("attention_over_queries", "x.transpose(1, 2)).softmax(dim=2)", "x.transpose(1, 2)).softmax(dim=1)",
         f"{EFFICIENT}::test_published_numbers"),
    ),
    *of_file(
        "poolings/efficient.py",
        ("queries_scaled_by_their_slice", "self.dim**-0.5", "(self.dim // self.queries) ** -0.5",
         f"{EFFICIENT}::test_published_numbers"),
        ("queries_divide_the_input", "if self.num_features % whole(", "if dim % whole(",
         f"{PROBES}::test_settings_that_cannot_work"),
        ("ep_all_without_its_token", "takes_cls = True", "takes_cls = False",
         f"{PROBES}::test_probes_are_no_operators_of_backbones"),
    ),
    *of_file(
        "poolings/multiple_instance.py",
        ("features_before_self_attention", "            x = self.self_attn(x)", "            self.self_attn(x)",
         f"{SCORED}::test_formula"),
    ),
    *of_file(
        "poolings/probes.py",
        ("aim_normalises_each_token", "self.bn(x.flatten(0, 1)).unflatten(0, x.shape[:2])",
         "F.layer_norm(x, (self.dim,), eps=1e-6)", f"{GOLDEN}[aim]"),
        ("cae_values_as_keys", "* self.norm1_v.weight + self.norm1_v.bias", "* self.norm1_k.weight + self.norm1_k.bias",
         f"{GOLDEN}[cae]"),
        ("cae_trains_what_it_does_not_use", "eps=CAE_EPS).requires_grad_(False)", "eps=CAE_EPS)",
         f"{PROBES}::test_every_trained_parameter_gets_a_gradient"),
        ("coca_key_is_value", "self.to_kv.weight.chunk(2)  # (64, D)", "self.to_kv.weight.chunk(2)[::-1]",
         f"{GOLDEN}[coca]"),
        ("coca_heads_scaled_by_width", "query @ key * HEAD_WIDTH**-0.5", "query @ key * self.dim**-0.5",
         f"{PROBES}::test_formula"),
        ("vjepa_without_its_residual", 'query = query + self.xattn["proj"](context)',
         'query = self.xattn["proj"](context)', f"{GOLDEN}[vjepa]"),
        ("values_without_their_bias", "project(attention @ x, value) + kv.bias.chunk(2)[1]",
         "project(attention @ x, value)", f"{GOLDEN}[capi]"),
        ("capi_has_one_head", "self.kv, self.dim // HEAD_WIDTH)", "self.kv, 1)", f"{PROBES}::test_formula"),
    ),
    *of_file(
        "evaluation/probe_families.py",
        ("statistics_of_the_past_in_training", "module.train()(x), target)", "module.eval()(x), target)",
         f"{FAMILIES}::test_a_head_follows_torchs_optimizer[cae:heads=4-dino]"),
        ("rates_of_the_last_step_kept", '= group["peak"] * lr_scale', '= group["lr"] * lr_scale',
         f"{FAMILIES}::test_a_head_follows_torchs_optimizer[abmilp-dino]"),
        ("heads_share_their_parameters", "copy.deepcopy(first) for _", "copy.copy(first) for _",
         f"{FAMILIES}::test_every_head_of_every_probe_ends_as_it_would_alone[ep]"),
    ),
    *of_file(
        "evaluation/ranks.py",
        ("gradients_of_one_rank", "gradient.copy_(total.view_as(gradient))", "gradient.mul_(1.0)",
         f"{PROGRAM}::test_two_ranks_train_the_probes_of_one"),
        ("every_ranks_rows_come_first", "pieces[get_rank()] = mine", "pieces[0] = mine",
         f"{PROGRAM}::test_two_ranks_train_the_probes_of_one"),
    ),
    *of_file(
        "evaluation/probe_heads.py",
        ("start_from_whatever_was_drawn", "torch.manual_seed(seed)", "torch.manual_seed(torch.seed())",
         "tests/evaluation/test_probe_heads.py::test_the_start_depends_on_the_seed_alone"),
        ("batchnorm_with_torchs_eps", "NORM_EPS = 1e-6", "NORM_EPS = 1e-3",
         "tests/evaluation/test_probe_heads.py::test_logits_are_linear_of_batchnorm_of_the_pooling[ep]"),
    ),
    *of_file(
        "evaluation/probe_recipes.py",
        ("adamw_with_its_own_betas", "(0.9, 0.95)", "(0.9, 0.999)",
         "tests/evaluation/test_probe_recipes.py::test_optimizers_are_the_published_ones"),
    ),
    *of_file(
        "evaluation/probe_cache.py",
        ("a_batch_counted_twice", "(number + 1) * batch_size)", "number * batch_size)",
         "tests/evaluation/test_probe_cache.py::test_counts_do_not_depend_on_how_much_is_kept"),
        ("tokens_of_other_images", "lambda x, rows=rows: x[rows]", "lambda x, rows=rows: x[rows.sort().values]",
         "tests/evaluation/test_probe_cache.py::test_training_tokens_are_those_of_the_sampled_images"),
    ),
    *of_file(
        "evaluation/probe_sweep.py",
        ("best_of_a_probe_by_val", 'self.rows[i]["selection_top1"])', 'self.rows[i]["val_top1"])',
         "tests/evaluation/test_probe_sweep.py::test_the_best_head_of_each_probe_is_the_one_of_the_selection"),
    ),
]  # fmt: skip
