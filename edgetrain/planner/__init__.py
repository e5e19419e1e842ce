"""Which block keeps, recomputes or inverts: plans and the programs that follow from them."""

from edgetrain.planner.from_scratch import PlanFromScratch, SequencePlan, SequencePoint, plan_from_scratch
from edgetrain.planner.planning import SNR_LIMIT, Planner, plan
from edgetrain.planner.plans import Alternative, Costed, Plan, uniform_plan
from edgetrain.planner.schedule import schedule
from edgetrain.planner.search import Candidate, Search
from edgetrain.planner.uniform import UniformMode

__all__ = [
    "SNR_LIMIT",
    "Alternative",
    "Candidate",
    "Costed",
    "Plan",
    "PlanFromScratch",
    "Planner",
    "Search",
    "SequencePlan",
    "SequencePoint",
    "UniformMode",
    "plan",
    "plan_from_scratch",
    "schedule",
    "uniform_plan",
]
