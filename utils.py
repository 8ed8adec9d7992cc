"""The names that code written for DINO imports from its `utils`, re-exported from the modules that define them."""

from __future__ import annotations

from torch.nn.init import trunc_normal_

from data.augment import GaussianBlur, Solarization
from distill.multicrop import MultiCropWrapper
from evaluation.knn import accuracy
from evaluation.models import (
    LoadedModel,
    backbone_weights,
    load_backbone,
    load_checkpoint_model,
    load_pretrained_linear_weights,
    load_pretrained_weights,
)
from evaluation.retrieval import PCA, compute_ap, compute_map, multi_scale
from optim.batchnorm import has_batchnorms
from optim.clipping import cancel_gradients_last_layer, clip_gradients
from optim.groups import get_params_groups
from optim.lars import LARS
from optim.schedules import cosine_scheduler
from pretrained import MODEL_KEYS, POLICY_KEYS
from runtime.checkpoint import restart_from_checkpoint, save_on_master
from runtime.cli import bool_flag, float_or_none
from runtime.distributed import (
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    reduce_dict,
    setup_for_distributed,
)
from runtime.meters import MetricLogger, SmoothedValue
from runtime.reproduce import fix_random_seeds, get_sha

__all__ = [
    "LARS",
    "MODEL_KEYS",
    "PCA",
    "POLICY_KEYS",
    "GaussianBlur",
    "LoadedModel",
    "MetricLogger",
    "MultiCropWrapper",
    "SmoothedValue",
    "Solarization",
    "accuracy",
    "backbone_weights",
    "bool_flag",
    "cancel_gradients_last_layer",
    "clip_gradients",
    "compute_ap",
    "compute_map",
    "cosine_scheduler",
    "fix_random_seeds",
    "float_or_none",
    "get_params_groups",
    "get_rank",
    "get_sha",
    "get_world_size",
    "has_batchnorms",
    "init_distributed_mode",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "load_backbone",
    "load_checkpoint_model",
    "load_pretrained_linear_weights",
    "load_pretrained_weights",
    "multi_scale",
    "reduce_dict",
    "restart_from_checkpoint",
    "save_on_master",
    "setup_for_distributed",
    "trunc_normal_",
]
