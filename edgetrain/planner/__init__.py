"""Which block keeps, recomputes or inverts: plans and the programs that follow from them."""

from edgetrain.planner.plan import Plan, UniformMode, uniform_plan
from edgetrain.planner.schedule import schedule

__all__ = ["Plan", "UniformMode", "schedule", "uniform_plan"]
