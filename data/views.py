"""Views: from the images of a data set to what a model sees."""

from __future__ import annotations

from torch import Tensor

from data.augment import ColourStage, CropSpec
from data.source import ImageSource
from data.train_set import CropBatch, TrainSet


class MultiCropViews:
    """Multi-crop: crops are cut in the loader's workers; their colours are changed here, on the device."""

    def __init__(self, spec: CropSpec) -> None:
        self.spec, self.colour = spec, ColourStage(spec)

    def dataset(self, source: ImageSource, seed: int, on_bad_image: str = "substitute") -> TrainSet:
        """(epoch, index) pairs to batches of uint8 crops."""
        return TrainSet(source, self.spec, seed, on_bad_image)

    def on_device(self, batch: CropBatch) -> list[Tensor]:
        """Normalised float crops, one tensor per resolution: [(2B, C, S, S), (nB, C, s, s)]."""
        return self.colour(batch.crops, batch.colour)

    def notes(self) -> list[str]:
        """What the settings leave out, for the first lines of a run."""
        left_out = self.spec.left_out()
        return [left_out] if left_out else []
