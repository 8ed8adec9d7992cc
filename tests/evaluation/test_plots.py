"""Curves: everything that a log holds, whatever the method, and what is known of it."""

from __future__ import annotations

import math

import pytest

from evaluation import plots

DINO = [
    {
        "epoch": e, "train_loss": 5.0, "train_entropy": 3.0, "train_kl": 2.0, "train_lr": 0.1, "train_wd": 0.04,
        "monitors": {"information": 0.5, "entropy": 0.5, "mean_cosine": 0.3, "effective_rank": 9.0, "center_norm": 1.0},
        "images_per_s": 10.0, "bad_images": 0, "time_s": 3.0,
        "k-NN": {"10": {"top1": 50.0, "top5": 90.0}, "20": {"top1": 51.0, "top5": 90.0}},
    }
    for e in range(-1, 3)
]  # fmt: skip


def by_title(rows, config=None):
    return {panel.title: panel for panel in plots.panels(rows, config or {})}


def test_the_loss_is_shown_with_the_entropy_of_no_opinion():
    """ln K stands in the loss of a self-distilled run whose number of prototypes is known, and in no other."""
    assert list(by_title(DINO, {"out_dim": 1024})["Loss"].limits.values()) == [pytest.approx(math.log(1024))]
    assert by_title(DINO)["Loss"].limits == {}
    supervised = [{"epoch": 0, "train_loss": 2.0}]
    assert by_title(supervised, {"out_dim": 1024})["Loss"].limits == {}


def test_thresholds_of_the_monitors_are_those_of_the_warnings():
    """Signs of collapse are drawn with the limits that the warning uses."""
    panels = by_title(DINO)
    assert plots.UNINFORMED in panels["Information of the output (nats)"].limits.values()
    assert plots.SAME_FEATURES in panels["Cosine between different images"].limits.values()
    assert plots.FEW_DIRECTIONS in panels["Effective rank of the features"].limits.values()


def test_an_evaluation_before_the_first_epoch_stands_at_zero():
    """Values are drawn over the epochs done: a row with epoch -1 at 0, the first epoch's at 1."""
    assert by_title(DINO)["k-NN top-1 (%)"].lines["k = 10"] == ([0, 1, 2, 3], [50.0] * 4)


def test_any_methods_log_becomes_curves():
    """Unknown terms, monitors and evaluations get panels of their own."""
    rows = [
        {"epoch": e, "train_loss": 1.0, "train_patch_loss": 0.5, "monitors": {"mask_share": 0.3},
         "val": {"student": {"top1": 70.0}, "ema": {"top1": 71.0}}}
        for e in range(3)
    ]  # fmt: skip
    panels = by_title(rows)
    assert panels["Patch loss"].lines["train_patch_loss"][1] == [0.5] * 3
    assert panels["Mask share"].lines["mask_share"][1] == [0.3] * 3
    assert set(panels["val top-1 (%)"].lines) == {"student", "ema"}


def test_missing_values_leave_gaps():
    """Nulls and text are left out of a curve."""
    rows = [{"epoch": 0, "train_loss": None}, {"epoch": 1, "train_loss": 3.0}, {"epoch": 2, "train_loss": "x"}]
    assert plots.series(rows, "train_loss") == ([2], [3.0])


@pytest.mark.parametrize("title", list(by_title(DINO, {"out_dim": 4})))
def test_titles_fit_their_panels_and_axes_have_no_offset(title, monkeypatch):
    """No title is cut off, and values that differ little are written in full instead of as an offset."""
    made, real = [], plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *size: made.append(real(*size)) or made[-1])
    panel = by_title(DINO, {"out_dim": 4})[title]
    panel.lines = {label: (epochs, [1000 + 1e-3 * e for e in epochs]) for label, (epochs, _) in panel.lines.items()}
    panel.limits = dict.fromkeys(panel.limits, 1000)
    assert plots.draw(panel).startswith(b"\x89PNG")
    ((figure, axis),) = made
    figure.canvas.draw()  # saving measured at another resolution
    assert axis.title.get_window_extent().x1 < figure.bbox.width
    assert axis.yaxis.get_offset_text().get_text() == ""
