"""Data: formats, batches, augmentation.

``open_source`` finds out the format; ``Loader`` makes batches of it, ``ArrayLoader`` without PyTorch;
``channel_statistics`` gives what to normalise by.
"""

from edgetrain.train.data.loader import ArrayLoader, Loader
from edgetrain.train.data.normalise import channel_statistics, sample_images
from edgetrain.train.data.opening import open_source
from edgetrain.train.data.source import BrokenImage, Source, Split
from edgetrain.train.data.subset import Subset

__all__ = [
    "ArrayLoader",
    "BrokenImage",
    "Loader",
    "Source",
    "Split",
    "Subset",
    "channel_statistics",
    "open_source",
    "sample_images",
]
