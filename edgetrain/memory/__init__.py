"""Memory of training steps: closed formulas and measurement."""

from edgetrain.memory.closed_form import (
    PRINTED,
    floor_bytes_per_pixel,
    resnet_bytes_per_pixel,
    reversible_bytes_per_pixel,
)
from edgetrain.memory.measure import Measurement, measure_peak, measure_process_growth

__all__ = [
    "PRINTED",
    "Measurement",
    "floor_bytes_per_pixel",
    "measure_peak",
    "measure_process_growth",
    "resnet_bytes_per_pixel",
    "reversible_bytes_per_pixel",
]
