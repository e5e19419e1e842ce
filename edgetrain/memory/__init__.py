"""Memory of training steps: closed formulas, traces, simulated allocators, estimates, measurement."""

from edgetrain.memory.closed_form import (
    PRINTED,
    floor_bytes_per_pixel,
    resnet_bytes_per_pixel,
    reversible_bytes_per_pixel,
)
from edgetrain.memory.composition import Composition, compose
from edgetrain.memory.costs import BlockCosts, Costs, measure_costs
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
from edgetrain.memory.estimate import Estimate, Line, estimate, estimate_measured, max_batch
from edgetrain.memory.forward import ForwardMemory, Guest, forward_memory
from edgetrain.memory.measure import Measurement, measure_peak, measure_process_growth
from edgetrain.memory.measured_times import measured_times
from edgetrain.memory.predicted_times import predicted_times
from edgetrain.memory.rates import OperatorRates, rates_of
from edgetrain.memory.simulate import Moment, Simulation, simulate
from edgetrain.memory.step import OPTIMIZERS, classification_loss, trace_step
from edgetrain.memory.timeline import Timeline, timeline
from edgetrain.memory.times import BlockTimes, Times, block_seconds, program_seconds
from edgetrain.memory.trace import StepTrace

__all__ = [
    "OPTIMIZERS",
    "PRINTED",
    "Allocation",
    "AllocatorReport",
    "AllocatorSettings",
    "BlockCosts",
    "BlockTimes",
    "CachingAllocator",
    "Composition",
    "Costs",
    "Estimate",
    "ForwardMemory",
    "Guest",
    "Line",
    "Measurement",
    "MemoryEvent",
    "Moment",
    "OperatorRates",
    "Release",
    "SimulatedOutOfMemoryError",
    "Simulation",
    "StepTrace",
    "Timeline",
    "Times",
    "TraceReport",
    "block_seconds",
    "classification_loss",
    "compose",
    "estimate",
    "estimate_measured",
    "floor_bytes_per_pixel",
    "forward_memory",
    "max_batch",
    "measure_costs",
    "measure_peak",
    "measure_process_growth",
    "measured_times",
    "predicted_times",
    "program_seconds",
    "rates_of",
    "replay",
    "replay_snapshot",
    "resnet_bytes_per_pixel",
    "reversible_bytes_per_pixel",
    "simulate",
    "timeline",
    "trace_step",
]
