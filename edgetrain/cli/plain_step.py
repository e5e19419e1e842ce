"""What an exported training step must be told of a run: which weights it trains; and which runs it cannot express.

The step in a graph minimises the cross-entropy of a batch. A run that learnt from something else would go on with
another loss, without a word, so it is refused.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from edgetrain.chain import freeze
from edgetrain.chain.trained import fix_batch_norm, train_only
from edgetrain.errors import UsageError
from edgetrain.planner import Plan
from edgetrain.train.run_record import RunRecord


def plain_step(run: Path, record: RunRecord, model: nn.Module, format: str) -> nn.Module:
    """``model`` of the run, with those of its weights frozen that the run does not train.

    Args:
        format: to which it is exported, for messages.

    Raises:
        UsageError: the run does not minimise the cross-entropy of all its blocks.
    """
    differs = _other_step(run, record)
    if differs is not None:
        found, change = differs
        raise UsageError(
            found=f"--format {format} of {run}, {found}",
            expected="a run of plain cross-entropy, which is the loss in the graph",
            action=f"train {change}, or let edgetrain resume end the run as it was begun",
        )
    if record.training is not None:
        model = freeze(model, record.training.freeze)
    if record.finetuning is None:
        return model
    how = record.finetuning
    model = train_only(model, how.trained, head=how.head)
    return fix_batch_norm(model) if how.batch_norm == "fixed" else model


def order_note(record: RunRecord) -> str | None:
    """What a person should know of the images' order, which no graph holds."""
    if record.finetuning is None or record.finetuning.balance not in ("root", "sampling"):
        return None
    drawn = f"the run drew rare classes more often (--balance {record.finetuning.balance})"
    return f"{drawn}; a graph takes the batches that it is given"


def _other_step(run: Path, record: RunRecord) -> tuple[str, str] | None:
    """How the run's step differs, and how to train one that does not; None: in nothing."""
    training, finetuning = record.training, record.finetuning
    learned = None if training is None else training.objective
    if learned is not None and learned.name != "cross-entropy":
        return f"which learns from {learned.name}", "with --objective cross-entropy"
    if record.embedding is not None:
        return f"which gives embeddings of {record.embedding}", "with --objective cross-entropy"
    if learned is not None and learned.label_smoothing:
        return f"whose labels are smoothed by {learned.label_smoothing:g}", "without --label-smoothing"
    if finetuning is not None and finetuning.balance == "loss":
        return "whose classes are weighted in the loss (--balance loss)", "with --balance sampling or none"
    if training is not None and training.sample_modules is not None:
        return "which trains other modules in every step", "without --sample-modules: a graph is one step"
    plan = run / "plan.json"
    if plan.exists() and any(name.endswith("+attention") for name in Plan.read(plan).program.names):
        return "whose plan has attention taps", "without attention transfer"
    return None
