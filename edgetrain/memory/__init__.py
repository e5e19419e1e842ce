"""Memory of training steps: closed formulas and measurement."""

from edgetrain.memory.closed_form import (
    PRINTED,
    floor_bytes_per_pixel,
    resnet_bytes_per_pixel,
    reversible_bytes_per_pixel,
)
from edgetrain.memory.cuda_allocator import (
    Allocation,
    AllocatorReport,
    AllocatorSettings,
    CachingAllocator,
    MemoryEvent,
    Release,
    SimulatedOutOfMemoryError,
    TraceReport,
    replay,
    replay_snapshot,
)
from edgetrain.memory.measure import Measurement, measure_peak, measure_process_growth

__all__ = [
    "PRINTED",
    "Allocation",
    "AllocatorReport",
    "AllocatorSettings",
    "CachingAllocator",
    "Measurement",
    "MemoryEvent",
    "Release",
    "SimulatedOutOfMemoryError",
    "TraceReport",
    "floor_bytes_per_pixel",
    "measure_peak",
    "measure_process_growth",
    "replay",
    "replay_snapshot",
    "resnet_bytes_per_pixel",
    "reversible_bytes_per_pixel",
]
