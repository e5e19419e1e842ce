"""Data: formats, batches, augmentation.

``open_source`` finds out the format; ``Loader`` makes batches of it, ``ArrayLoader`` without PyTorch;
``channel_statistics`` gives what to normalise by.
"""

from edgetrain.train.data.groups import Groups
from edgetrain.train.data.holdout import open_divided
from edgetrain.train.data.loader import ArrayLoader, Loader
from edgetrain.train.data.normalise import channel_statistics, sample_images
from edgetrain.train.data.opening import open_source
from edgetrain.train.data.reduced import decoding_bytes
from edgetrain.train.data.source import BrokenImage, Source, Split
from edgetrain.train.data.subset import Subset

__all__ = [
    "ArrayLoader",
    "BrokenImage",
    "Groups",
    "Loader",
    "Source",
    "Split",
    "Subset",
    "channel_statistics",
    "decoding_bytes",
    "open_divided",
    "open_source",
    "sample_images",
]
