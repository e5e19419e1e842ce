"""The fastest step of a chain within a number of bytes, by dynamic programming.

Persistent schedules in the sense of rotor (Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, "Optimal checkpointing
for heterogeneous chains", 2019), with inversion as a further way to come by a block's input, and with host memory and
bfloat16 as further places for a checkpoint. ``best(s, t, m)`` is the least time in which, from z[s], the gradients of
blocks t..s are computed with m bytes; the loss comes in between if t is the last block, else g[t+1] is there. It is the
least of

    store       run s and keep what autograd saves; best(s+1, t); backward of s
    selective   run s and keep z[s] and the results of its products; best(s+1, t); run the rest of s again and go back
    checkpoint  keep z[s], run s..k-1 and keep nothing; best(k, t); best(s, k-1) from z[s]
    offload     the same with z[s] elsewhere meanwhile: none of it in the host's memory, or a part, rounded
    recompute   s = t alone: run it once more from z[s] and go back
    invert      run s..j in the memory of z[s], each block keeping what its way back needs (nothing, or the results of
                its products); best(j+1, t), which leaves z[j+1]; invert j..s

A run of inversions begins at an exact z[j+1], because inverting adds noise: its length is bounded by
``Problem.reach``, so what is stored or recomputed in between is exact and stops the noise.

z[s] is in one of three states: ``free`` (the schedule may drop it), ``need`` (an inversion of s-1 will start from it:
it must be there in the end), ``hold`` (somebody else holds it: it costs nothing and stays). Parameters' gradients
appear in a fixed order, last block first, so what they occupy is known for every (s, t).

A place that rounds adds states. ``near`` is ``need`` where z[s] may come back rounded; the inversions that start from
it go as far as ``Problem.rounded_reach``. ``free rounded``, ``need rounded`` and ``hold rounded``: z[s] was rounded, or
computed from a rounded one. Blocks are not inverted from there: how noise grows on its way forward is not known.

Bytes are counted in slots. Rounded down, the table bounds what any schedule of this family takes by these bytes;
rounded to the nearest with the remainders carried on from block to block, sums are off by no more than a slot whatever
their length, and the schedules it gives are checked byte by byte afterwards (:mod:`edgetrain.planner.search`).

The table takes O(L^2 M) memory and O(L^3 M) time for L blocks and M slots, in NumPy.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from edgetrain.planner.stages import Away, Problem, Selection, Way
from edgetrain.runtime.program import (
    INVERSIONS,
    Backward,
    Fetch,
    Forward,
    Free,
    Head,
    Instruction,
    Inversion,
    Keep,
    Offload,
    Recompute,
    Update,
    kept_by,
)

State = Literal["free", "need", "hold", "near", "free rounded", "need rounded", "hold rounded"]
Kind = Literal["store", "selective", "checkpoint", "recompute", "invert"]
Rounding = Literal["nearest", "down"]

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Slots = np.ndarray[tuple[int, ...], np.dtype[np.int32]]

_STATES: tuple[State, ...] = get_args(State)
_EXACT: tuple[State, ...] = ("free", "need", "hold", "near")
_HOLD: tuple[State, ...] = ("hold", "hold rounded")
_NEED: tuple[State, ...] = ("need", "near", "need rounded")
_WHEN_ROUNDED: dict[State, State] = {
    "free": "free rounded",
    "near": "need rounded",
    "free rounded": "free rounded",
    "need rounded": "need rounded",
}
"""The state after z[s] was rounded, where it may be."""


@dataclass(frozen=True)
class Move:
    """One alternative of the recursion.

    Attributes:
        place: of a checkpoint; None: it stays as it is.
        end: state in which z[j+1] is asked for, of an inversion.
    """

    kind: Kind
    place: Away | None = None
    end: State = "need"


class Table:
    """``best`` for all s, t and m.

    Args:
        top_bytes: the largest budget in it.
        slots: number of steps from 0 to ``top_bytes``.
        rounding: of bytes to slots.

    Attributes:
        unit_bytes: of a slot.
    """

    def __init__(self, problem: Problem, top_bytes: int, *, slots: int = 500, rounding: Rounding = "nearest") -> None:
        self._problem, self._stages, self.slots = problem, problem.stages, slots
        self.unit_bytes = max(1.0, top_bytes / slots)
        self._rounding = rounding
        self._count = len(problem.stages)
        self._z = np.array(problem.activation_bytes, dtype=np.int64)
        self._gradients = np.array(problem.gradients_after, dtype=np.int64)
        # Python's own numbers, for arithmetic one at a time
        self._z_bytes: list[int] = self._z.tolist()
        self._gradient_bytes: list[int] = self._gradients.tolist()
        # what is there all through blocks ..t: g[t+1], and gradients of later parameters
        self._waiting = [z + g for z, g in zip([*self._z_bytes[1:-1], 0], self._gradient_bytes[1:], strict=True)]
        self._z_slots, self._saved_slots, self._products_slots = self._rounded_sizes()
        self._held_slots = {
            place.to: self._rounded([float(nbytes or 0) for nbytes in place.held_bytes]) for place in problem.places
        }
        self._forward = np.cumsum([0.0, *(stage.dropping_seconds for stage in self._stages)])
        self._passes_from = [
            (stage.forward_seconds + self._forward[s + 1 :] - self._forward[s + 1]).astype(np.float32)[:, None]
            for s, stage in enumerate(self._stages)
        ]
        self._dropping = self._z[:-1] + np.array([stage.dropping_bytes for stage in self._stages], dtype=np.int64)
        self._way_slots = self._rounded_ways()
        shape = self._count, self._count + 1, slots + 1
        states = _STATES if problem.rounds else _STATES[:3]
        self._best: dict[State, Array] = {state: np.full(shape, np.inf, dtype=np.float32) for state in states}
        self._reach: dict[State, tuple[int, ...]] = {"need": problem.reach}
        if problem.rounds:
            self._reach["near"] = problem.rounded_reach
        self._last_ahead: tuple[Any, Array] | None = None
        # the fewest slots from which on nothing changes any more: of each cell of the last t, the most of (t, s..) for
        # the last t, and the most of (..t, s) for each s
        self._settled: dict[State, dict[int, int]] = {state: {} for state in states}
        self._settled_after = dict.fromkeys(states, 0)
        self._settled_from = [0] * (self._count + 1)
        self._peaks_from = [
            np.concatenate(([np.iinfo(np.int64).min // 2], np.maximum.accumulate(self._dropping[s + 1 :])))
            for s in range(self._count)
        ]
        self._inverted: dict[State, Array] = {end: np.full(shape, np.inf, dtype=np.float32) for end in self._reach}
        for t in range(self._count):
            runs = {end: np.full((self._count, slots + 1), np.inf, dtype=np.float32) for end in self._reach}
            settled = dict.fromkeys(self._reach, 0)  # likewise of all rows of a run
            self._settled_after = dict.fromkeys(states, 0)
            for s in range(t + 1, -1, -1):
                for end, rows in runs.items():
                    settled[end] = self._extend(rows, t, s, end, settled[end])
                for state in self._states(s):
                    cell = self._best[state][t, s] = self._cell(t, s, state)
                    self._settled[state][s] = _settled(cell)
                for state in self._states(s):
                    self._settled_after[state] = max(self._settled_after[state], self._settled[state][s])
                    self._settled_from[s] = max(self._settled_from[s], self._settled[state][s])
                for end, rows in runs.items():  # a run may end with block s-1: z[s] is then exact
                    known = _known(rows[:s], settled[end], self._settled[end].get(s, 0))
                    np.minimum(known, self._best[end][t, s, : known.shape[1]], out=known)
                    settled[end] = known.shape[1] - 1

    def seconds(self, m: int) -> float:
        """Least time of a step with ``m`` slots; infinite where there is none."""
        return float(self._best["hold"][-1, 0, m]) + self._problem.head_seconds

    def least(self) -> int | None:
        """The fewest slots in which a step is possible."""
        feasible = np.flatnonzero(np.isfinite(self._best["hold"][-1, 0]))
        return int(feasible[0]) if len(feasible) else None

    def steps(self) -> list[int]:
        """The fewest slots for each different time, fewest first."""
        times = self._best["hold"][-1, 0]
        changes = np.flatnonzero(np.isfinite(times[1:]) & (times[1:] < times[:-1])) + 1
        least = self.least()
        return [] if least is None else sorted({least, *(int(m) for m in changes)})

    def instructions(self, m: int, *, update_in_backward: bool = False) -> tuple[Instruction, ...]:
        """The schedule behind :meth:`seconds`."""
        steps: list[Instruction] = []
        self._emit(steps, self._count - 1, 0, "hold", m)
        if update_in_backward:
            steps = [part for step in steps for part in _with_update(step)]
        return tuple(steps)

    # --- sizes

    def _rounded_sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Slots of z[0..L], and of what each block saves, all of it or the results of its products."""
        selections = [stage.selection for stage in self._stages]
        saved = [float(stage.saved_bytes) for stage in self._stages]
        products = [0.0 if found is None else float(found.products_bytes) for found in selections]
        exact = [float(self._z[0]), *(x for pair in zip(saved, self._z[1:], strict=True) for x in pair)]
        rounded, selected = self._rounded(exact), self._rounded(products)
        return rounded[0::2], rounded[1::2], selected

    def _rounded(self, exact: list[float]) -> list[int]:
        if self._rounding == "down":
            return [int(x // self.unit_bytes) for x in exact]
        ends = np.rint(np.cumsum([0.0, *exact]) / self.unit_bytes).astype(int)
        return [int(x) for x in np.diff(ends)]

    def _rounded_ways(self) -> list[dict[Inversion, int]]:
        """Slots of what each block keeps for each way of inverting it."""
        held = [{way.how: way.held_bytes for way in stage.ways} for stage in self._stages]
        slots = {how: self._rounded([float(ways.get(how, 0)) for ways in held]) for how in INVERSIONS}
        return [{how: slots[how][i] for how in ways} for i, ways in enumerate(held)]

    def _threshold(self, nbytes: float) -> int:
        """Slots without which ``nbytes`` do not fit; as :meth:`_thresholds`, which takes longer for one number."""
        slots = nbytes / self.unit_bytes
        return math.floor(slots) if self._rounding == "down" else math.ceil(slots - 0.5)

    def _thresholds(self, nbytes: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Slots:
        slots = nbytes / self.unit_bytes
        return (np.floor(slots) if self._rounding == "down" else np.ceil(slots - 0.5)).astype(np.int32)

    def _states(self, s: int) -> list[State]:
        """Those in which anybody may ask for z[s]."""
        states: list[State] = ["free"] if s > 0 else []
        if s > 0 and self._stages[s - 1].ways:
            states.append("need")
        before = self._stages[s - 1]
        if s == 0 or before.keeps_output or (before.selection is not None and before.selection.keeps_output):
            states.append("hold")
        if self._problem.rounds:
            states += ["near"] if "need" in states else []
            states += [_WHEN_ROUNDED[state] for state in states if state in ("free", "near")]
            states += ["hold rounded"] if "hold" in states and s > 0 else []
        return states

    # --- the recursion

    def _cell(self, t: int, s: int, state: State) -> Array:
        if s == t + 1:
            own = 0 if state in _HOLD else self._z_bytes[s]
            last = t == self._count - 1
            needed = own + (self._problem.head_bytes if last else self._waiting[t])
            base = np.zeros(self.slots + 1, dtype=np.float32)
            base[: self._threshold(needed)] = np.inf
            return base
        best: Array | None = None
        for _, _, values in self._candidates(t, s, state, 0, self.slots + 1):
            least = values.min(0) if len(values) > 1 else values[0]
            if best is None:  # to store is always a candidate, in a row of its own
                best = least
                continue
            known = len(least)
            np.minimum(best[:known], least, out=best[:known])
            if known < len(best):
                np.minimum(best[known:], least[-1], out=best[known:])
        assert best is not None
        return best

    def _candidates(self, t: int, s: int, state: State, low: int, high: int) -> Iterator[tuple[Move, int, Array]]:
        """Each move with its first k, and the time for m = low..high-1 in a row for every k from there on.

        Rows may end earlier: from their last column on nothing changes.
        """
        stage, waiting = self._stages[s], self._waiting[t]
        own, own_slots = (0, 0) if state in _HOLD else (self._z_bytes[s], self._z_slots[s])

        kept = own if stage.keeps_input or state in _NEED else 0
        kept_slots = own_slots if kept else 0
        held = stage.saved_bytes + kept + (self._z_bytes[s + 1] if stage.keeps_output else 0)
        held_slots = self._saved_slots[s] + kept_slots + (self._z_slots[s + 1] if stage.keeps_output else 0)
        needed = max(
            own + stage.forward_all_bytes + waiting,
            held + self._z_bytes[s + 1] + stage.backward_bytes + self._gradient_bytes[s + 1],
        )
        after = self._best[_next(state, held=stage.keeps_output)][t, s + 1 : s + 2]
        seconds = np.float32(stage.forward_all_seconds + stage.backward_seconds)
        yield Move("store"), s, _sums(after, held_slots, seconds, low, high, least=self._threshold(needed))

        if stage.selection is not None:
            yield self._selective(t, s, state, stage.selection, own, own_slots, low, high)
        if stage.recompute_seconds is not None and t > s:
            yield from self._checkpoints(t, s, state, own, own_slots, low, high)
        if stage.recompute_seconds is not None and t == s and t < self._count - 1:
            needed = own + waiting + stage.recompute_bytes
            values = np.full((1, high - low), stage.recompute_seconds, dtype=np.float32)
            yield Move("recompute"), s, _from(values, self._threshold(needed), low)
        if state == "free" and stage.ways:
            for end, inverted in self._inverted.items():
                yield Move("invert", end=end), s, inverted[t, s : s + 1, low:high]

    def _selective(
        self, t: int, s: int, state: State, selection: Selection, own: int, own_slots: int, low: int, high: int
    ) -> tuple[Move, int, Array]:
        output = self._z_bytes[s + 1]
        held = own + selection.products_bytes + (output if selection.keeps_output else 0)
        needed = max(
            own + selection.forward_bytes + self._waiting[t],
            held + output + selection.backward_bytes + self._gradient_bytes[s + 1],
        )
        after = self._best[_next(state, held=selection.keeps_output)][t, s + 1 : s + 2]
        seconds = np.float32(selection.forward_seconds + selection.backward_seconds)
        shift, least = self._selected_slots(s, selection, own_slots), self._threshold(needed)
        return Move("selective"), s, _sums(after, shift, seconds, low, high, least=least)

    def _selected_slots(self, s: int, selection: Selection, own_slots: int) -> int:
        return own_slots + self._products_slots[s] + (self._z_slots[s + 1] if selection.keeps_output else 0)

    def _checkpoints(
        self, t: int, s: int, state: State, own: int, own_slots: int, low: int, high: int
    ) -> Iterator[tuple[Move, int, Array]]:
        """k from s+1 to t, with z[s] as it is and in every other place."""
        waiting = self._waiting[t]
        first = own + self._stages[s].forward_bytes + waiting
        later = self._dropping[s + 1 : t]
        ahead = self._ahead(t, s, _next(state, held=False), own_slots, (first, own + waiting), low, high)
        yield Move("checkpoint"), s + 1, ahead + self._best[state][s:t, s, low : low + ahead.shape[1]]
        if state in _HOLD:
            return
        forward = self._passes(t, s)
        rest = self._best[_next(state, held=False)][t, s + 1 : t + 1]
        for place in self._problem.places:
            held, back = place.held_bytes[s], state if place.exact else _WHEN_ROUNDED.get(state)
            if held is None or back is None:
                continue
            leaving = max(first, own + held + self._z_bytes[s + 1] + waiting)
            coming = own + held + self._z[s + 1 : t + 1] + self._gradients[s + 1 : t + 1]
            peaks = np.maximum.accumulate(np.concatenate(([leaving], later + held + waiting)))
            passes = forward + np.float32(2 * own * place.seconds_per_byte)
            values = _sums(rest, self._held_slots[place.to][s], passes, low, high)
            values += self._best[back][s:t, s, low:high]
            yield Move("checkpoint", place), s + 1, _from(values, self._thresholds(np.maximum(peaks, coming)), low)

    def _passes(self, t: int, s: int) -> Array:
        """Seconds from z[s] to z[k] for each k from s+1 to t, (t - s, 1)."""
        return self._passes_from[s][: t - s]

    def _ahead(self, t: int, s: int, after: State, own_slots: int, held: tuple[int, int], low: int, high: int) -> Array:
        """Seconds from z[s] to z[k] and of blocks k..t from there, z[s] kept in ``own_slots``, for k from s+1 to t.

        Columns from which on neither this nor the time of blocks s..k-1 changes are left out but for the first.
        States of z[s] that differ in what comes afterwards ask for the same, one after the other: the last answer is
        kept.

        Args:
            held: bytes of the pass of block s, and beside each later pass.
        """
        key = t, s, after, own_slots, held, low, high
        if self._last_ahead is None or self._last_ahead[0] != key:
            first, beside = held
            thresholds = self._thresholds(np.maximum(self._peaks_from[s][: t - s] + beside, first))
            settled = max(int(thresholds[-1]), own_slots + self._settled_after[after], self._settled_from[s])
            high = min(high, max(low, settled) + 1)
            sums = _sums(self._best[after][t, s + 1 : t + 1], own_slots, self._passes(t, s), low, high)
            self._last_ahead = key, _from(sums, thresholds, low)
        return self._last_ahead[1]

    # --- runs of inversions: rows[r] is the least time from z[s] on if the run began at block r

    def _extend(self, rows: Array, t: int, s: int, end: State, settled: int) -> int:
        """From z[s+1] to z[s], block s among those that are inverted, if that is not too far from the run's end.

        Args:
            settled: the last column of ``rows`` that is kept up to date, as nothing changes from there on; the new one
                is given back.
        """
        if s > t:
            return settled
        first, ways = self._reach[end][s], self._stages[s].ways
        rows[: first if ways else s + 1] = np.inf
        if ways:
            least = [self._least_of(t, s, way) for way in ways]
            spent = [settled + self._way_slots[s][way.how] for way in ways]
            after = _known(rows[first : s + 1], settled, min(self.slots, max(*spent, *least)))
            settled = after.shape[1] - 1
            through = [_inverting(after, self._way_slots[s], way, least[k]) for k, way in enumerate(ways)]
            after[:] = functools.reduce(_lower, through)
        self._inverted[end][t, s, :settled] = rows[s, :settled]
        self._inverted[end][t, s, settled:] = rows[s, settled]
        return settled

    def _through(self, after: Array, t: int, i: int, way: Way) -> Array:
        """The time from z[i] on, from that from z[i+1] on, where block i is inverted in that way."""
        return _inverting(after, self._way_slots[i], way, self._least_of(t, i, way))

    def _least_of(self, t: int, i: int, way: Way) -> int:
        """Slots without which block i cannot be inverted in that way."""
        forward = self._z_bytes[i] + way.forward_bytes + self._waiting[t]
        backward = 2 * self._z_bytes[i + 1] + way.held_bytes + way.peak_bytes + self._gradient_bytes[i + 1]
        return self._threshold(max(forward, backward))

    def _run(self, t: int, s: int, end: State, m: int) -> tuple[list[Way], int]:
        """How blocks s, s+1, ... are inverted in the run behind :attr:`_inverted`, and the slots that are left."""
        stop = s
        while stop <= t and self._stages[stop].ways and self._reach[end][stop] <= s:
            stop += 1
        ending = self._best[end][t]
        times = {stop: ending[stop : stop + 1]}  # by block, as the rows above for a run that began at s
        for i in reversed(range(s, stop)):
            through = [self._through(times[i + 1], t, i, way) for way in self._stages[i].ways]
            times[i] = functools.reduce(np.minimum, through if i == s else [*through, ending[i : i + 1]])
        chosen: list[Way] = []
        for i in range(s, stop):
            if chosen and ending[i, m] <= times[i][0, m]:
                break
            ways = self._stages[i].ways
            chosen.append(min(ways, key=lambda way: self._through(times[i + 1], t, i, way)[0, m]))
            m -= self._way_slots[i][chosen[-1].how]
        return chosen, m

    # --- the schedule

    def _emit(self, steps: list[Instruction], t: int, s: int, state: State, m: int) -> None:
        if s == t + 1:
            if t == self._count - 1:
                steps.append(Head())
            if state in ("free", "free rounded"):
                steps.append(Free(s))
            return
        move, k = self._choice(t, s, state, m)
        again = t < self._count - 1
        stage = self._stages[s]
        own_slots = 0 if state in _HOLD else self._z_slots[s]
        is_free = state in ("free", "free rounded")
        if move.kind == "store":
            steps += _pass(s, s, "all", again=again)
            if is_free:
                steps.append(Free(s))
            kept_slots = own_slots if stage.keeps_input or state in _NEED else 0
            held = self._saved_slots[s] + kept_slots + (self._z_slots[s + 1] if stage.keeps_output else 0)
            self._emit(steps, t, s + 1, _next(state, held=stage.keeps_output), m - held)
            if stage.keeps_output:
                steps.append(Free(s + 1))
            steps.append(Backward(s, "saved"))
        elif move.kind == "selective":
            assert stage.selection is not None
            output_held = stage.selection.keeps_output
            steps += _pass(s, s, "products", again=again)
            left = m - self._selected_slots(s, stage.selection, own_slots)
            self._emit(steps, t, s + 1, _next(state, held=output_held), left)
            if output_held:
                steps.append(Free(s + 1))
            steps.append(Backward(s, "selective"))
            if is_free:
                steps.append(Free(s))
        elif move.kind == "checkpoint":
            place = move.place
            steps += _pass(s, s, "input", again=again)
            if place is not None:
                steps.append(Offload(s, place.to))
            steps += _pass(s + 1, k - 1, "nothing", again=again)
            held = own_slots if place is None else self._held_slots[place.to][s]
            self._emit(steps, t, k, _next(state, held=False), m - held)
            if place is not None:
                steps.append(Fetch(s))
            self._emit(steps, k - 1, s, state if place is None or place.exact else _WHEN_ROUNDED[state], m)
        elif move.kind == "recompute":
            steps.append(Backward(s, "recompute"))
            if is_free:
                steps.append(Free(s))
        else:
            ways, left = self._run(t, s, move.end, m)
            for keep, group in itertools.groupby(range(s, s + len(ways)), lambda i: kept_by(ways[i - s].how)):
                blocks = list(group)
                steps += _pass(blocks[0], blocks[-1], keep, again=again)
            self._emit(steps, t, s + len(ways), move.end, left)
            steps += [Backward(i, way.how) for i, way in reversed(list(enumerate(ways, s)))]
            steps.append(Free(s))

    def _choice(self, t: int, s: int, state: State, m: int) -> tuple[Move, int]:
        """The move behind ``best``, and its k."""
        best: tuple[float, Move, int] | None = None
        for move, first, values in self._candidates(t, s, state, m, m + 1):
            row = int(values[:, 0].argmin())
            if best is None or values[row, 0] < best[0]:
                best = float(values[row, 0]), move, first + row
        assert best is not None
        assert np.isfinite(best[0])
        return best[1], best[2]


def _next(state: State, *, held: bool) -> State:
    """Of a later block's input, as z[s] is in ``state``; ``held``: somebody else holds it."""
    if state in _EXACT:
        return "hold" if held else "free"
    return "hold rounded" if held else "free rounded"


def _inverting(after: Array, slots: dict[Inversion, int], way: Way, least: int) -> Array:
    """``after`` with a block inverted in that way before it, of which it keeps ``slots``; infinite below ``least``."""
    return _sums(after, slots[way.how], np.float32(way.forward_seconds + way.seconds), 0, after.shape[1], least=least)


def _known(rows: Array, settled: int, wanted: int) -> Array:
    """The columns of ``rows`` up to ``wanted``, or ``settled`` if that is later, from which on all are like it."""
    if wanted > settled:
        rows[:, settled + 1 : wanted + 1] = rows[:, settled : settled + 1]
    return rows[:, : max(settled, wanted) + 1]


def _lower(one: Array, other: Array) -> Array:
    """The smaller of each two numbers, in place of ``one``."""
    return np.minimum(one, other, out=one)


def _settled(times: Array) -> int:
    """The first of ``times``, one per number of slots, that is that of all after it."""
    others = times != times[-1]
    last = len(times) - 1 - int(others[::-1].argmax())
    return last + 1 if others[last] else 0


def _sums(rows: Array, shift: int, seconds: Array | np.float32, low: int, high: int, *, least: int = 0) -> Array:
    """``rows[:, low - shift : high - shift] + seconds``, infinite before the first column and below ``least``."""
    sums = np.empty((rows.shape[0], high - low), dtype=np.float32)
    begin = min(max(low, shift, least), high)
    sums[:, : begin - low] = np.inf
    np.add(rows[:, begin - shift : high - shift], seconds, out=sums[:, begin - low :])
    return sums


def _from(values: Array, thresholds: Slots | int, low: int) -> Array:
    """``values`` with infinity in row r where m is below ``thresholds[r]``, or one for all; overwritten."""
    if isinstance(thresholds, int):
        values[:, : max(0, thresholds - low)] = np.inf
        return values
    begin, end = (
        min(max(int(thresholds[k]) - low, 0), values.shape[1]) for k in (thresholds.argmin(), thresholds.argmax())
    )
    values[:, :begin] = np.inf
    if end > begin:
        columns = np.arange(low + begin, low + end, dtype=np.int32)
        np.copyto(values[:, begin:end], np.float32(np.inf), where=columns < thresholds[:, None])
    return values


def _pass(first: int, last: int, keep: Keep, *, again: bool) -> list[Instruction]:
    if not again:
        return [Forward(i, keep) for i in range(first, last + 1)]
    return [Recompute(first, last, keep)] if first <= last else []


def _with_update(step: Instruction) -> list[Instruction]:
    return [step, Update(step.block)] if isinstance(step, Backward) else [step]
