"""Curves: every panel fits, and what a log lacks is left out."""

from __future__ import annotations

from evaluation import plots


def test_titles_fit_their_panels(tmp_path, monkeypatch):
    """With every panel there is, in three columns, no title is cut off or reaches into the next one."""
    made, real = [], plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *args: made.append(real(*args)) or made[-1])
    keys = [key for _, lines, _ in plots.PANELS for key, _ in lines]
    plots.plot_curves([{"epoch": epoch, **dict.fromkeys(keys, 1.0)} for epoch in range(3)], tmp_path / "curves.png")
    ((figure, axes),) = made
    figure.canvas.draw()  # saving measured at another resolution
    for axis in axes.flat:
        assert axis.title.get_window_extent().width < figure.bbox.width / axes.shape[1]
