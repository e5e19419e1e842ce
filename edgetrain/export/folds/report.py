"""What was folded and what was not: each fold is a value with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """One rewrite, done or skipped.

    Attributes:
        kind: "batch norm", "parametrisation", "scale", "input normalisation", "Dirac delta", "halves", "plain layer",
            "identity" or "structure".
        where: path of what was, or would have been, folded away.
        reason: where it went; for a skipped one, why it stays.
    """

    kind: str
    where: str
    reason: str


@dataclass(frozen=True)
class FoldReport:
    """Every fold of a network, in the order in which they were made."""

    done: tuple[Fold, ...]
    skipped: tuple[Fold, ...]

    def table(self) -> str:
        """One line per fold under a heading, columns aligned."""
        rows = [("", "fold", "where", "reason")]
        rows += [(mark, f.kind, f.where, f.reason) for mark, f in self._marked()]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        return "\n".join("  ".join([*(row[k].ljust(widths[k]) for k in range(3)), row[3]]).rstrip() for row in rows)

    def __str__(self) -> str:
        return self.table()

    def _marked(self) -> list[tuple[str, Fold]]:
        return [("done", fold) for fold in self.done] + [("kept", fold) for fold in self.skipped]
