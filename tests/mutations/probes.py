"""Faults of the attentive probes."""

from __future__ import annotations

from tests.mutate import of_file

PROBES = "tests/poolings/test_probes.py"
EFFICIENT = "tests/poolings/test_efficient.py"
SCORED = "tests/poolings/test_multiple_instance.py"
GOLDEN = f"{PROBES}::test_published_numbers"

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
]  # fmt: skip
