"""The names that DINO's users import, and a script that uses them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils
import vision_transformer as vits
from distill.heads import DINOHead

ROOT = Path(__file__).resolve().parents[1]

DINO_NAMES = {
    "vision_transformer": "VisionTransformer vit_tiny vit_small vit_base DINOHead Block Attention Mlp PatchEmbed "
    "DropPath",
    "utils": "bool_flag float_or_none fix_random_seeds init_distributed_mode setup_for_distributed "
    "is_dist_avail_and_initialized get_rank get_world_size is_main_process save_on_master get_sha MetricLogger "
    "SmoothedValue reduce_dict accuracy cosine_scheduler clip_gradients cancel_gradients_last_layer get_params_groups "
    "has_batchnorms LARS MultiCropWrapper GaussianBlur Solarization load_pretrained_weights "
    "load_pretrained_linear_weights restart_from_checkpoint trunc_normal_ multi_scale PCA compute_ap compute_map",
    "main_dino": "get_args_parser train_dino DINOLoss DataAugmentationDINO",
    "eval_knn": "extract_features extract_feature_pipeline knn_classifier ReturnIndexDataset",
    "eval_linear": "eval_linear train validate_network LinearClassifier",
}


@pytest.mark.parametrize("module", DINO_NAMES)
def test_names_that_dino_users_import(module):
    """Every name is importable from where DINO's users expect it."""
    names = importlib.import_module(module)
    assert not [name for name in DINO_NAMES[module].split() if not hasattr(names, name)]


def test_a_training_script_written_against_dino(tmp_path):
    """The body of DINO's train function, by hand, with its modules and calling conventions."""
    arch = "vit_tiny"
    student = vits.__dict__[arch](patch_size=16, drop_path_rate=0.1)
    teacher = vits.__dict__[arch](patch_size=16)
    student = utils.MultiCropWrapper(student, DINOHead(student.embed_dim, 32, use_bn=False, norm_last_layer=True))
    teacher = utils.MultiCropWrapper(teacher, vits.DINOHead(teacher.embed_dim, 32, False))
    teacher.load_state_dict(student.state_dict())
    from main_dino import DINOLoss

    loss_fn = DINOLoss(32, 4, 0.04, 0.04, 0, 10)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    lr = utils.cosine_scheduler(0.0005, 1e-6, 10, 3, warmup_epochs=1)
    for group in optimizer.param_groups:
        group["lr"] = lr[3]
    images = [torch.randn(2, 3, 64, 64) for _ in range(2)] + [torch.randn(2, 3, 32, 32) for _ in range(2)]
    loss, _, _ = loss_fn(student(images), teacher(images[:2]), 0)
    loss.backward()
    norms = utils.clip_gradients(student, 3.0)
    assert len(norms) == len([p for p in student.parameters() if p.grad is not None])
    utils.cancel_gradients_last_layer(0, student, 1)
    optimizer.step()
    model = vits.__dict__[arch](patch_size=8, num_classes=0)
    features = []
    model.blocks[-1].attn.qkv.register_forward_hook(lambda _m, _i, output: features.append(output))
    attention = model.get_last_selfattention(torch.randn(1, 3, 32, 48))
    assert attention.shape == (1, 3, 25, 25)
    assert features[0].shape == (1, 25, 3 * 192)
    assert [t.shape for t in model.get_intermediate_layers(torch.randn(1, 3, 32, 32), 4)] == [(1, 17, 192)] * 4


def test_a_clone_named_dino_inside_another_project(tmp_path):
    """A project whose folder dino/ is this repository, put on sys.path by an __init__.py of the project's own."""
    clone = tmp_path / "dino"
    clone.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (clone / entry.name).symlink_to(entry)
    (clone / "__init__.py").write_text("import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\n")
    code = "import dino.vision_transformer as vits; print(vits.__dict__['vit_tiny'](patch_size=16).embed_dim)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "192", done.stderr
