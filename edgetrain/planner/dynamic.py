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

The table takes O(L^2 M) memory and O(L^3 M) time for L blocks and M slots. It is made from the last block to the first,
for every t at once, so NumPy is called O(L^2) times.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from edgetrain.planner.stages import Away, Problem, Way
from edgetrain.runtime.program import (
    INVERSIONS,
    SELECTIVE,
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
    Selective,
    Update,
    kept_by,
)

State = Literal["free", "need", "hold", "near", "free rounded", "need rounded", "hold rounded"]
Kind = Literal["store", "selective", "checkpoint", "recompute", "invert"]
Rounding = Literal["nearest", "down"]

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Slots = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Bytes = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

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
        how: which results of products are kept, of a selective move.
        place: of a checkpoint; None: it stays as it is.
        end: state in which z[j+1] is asked for, of an inversion.
    """

    kind: Kind
    how: Selective = "selective"
    place: Away | None = None
    end: State = "need"


_STORE, _CHECKPOINT, _RECOMPUTE = Move("store"), Move("checkpoint"), Move("recompute")
_SELECTIVE: dict[Selective, Move] = {how: Move("selective", how=how) for how in SELECTIVE}
_INVERT: dict[State, Move] = {end: Move("invert", end=end) for end in ("need", "near")}


class _Part(NamedTuple):
    """A move but for what is done in between, from z[k] on, by k from 0 to L: it asks for z[k] in a state.

    Attributes:
        held_slots: meanwhile.
        seconds: of the move itself, (L + 1, 1).
        beside_bytes: its most bytes beside what waits for blocks ..t to be done, (L + 1).
        alone_bytes: its most bytes when nothing waits for those any more, (L + 1).
    """

    after: State
    held_slots: int
    seconds: Array
    beside_bytes: Bytes
    alone_bytes: Bytes


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
        # what is there all through blocks ..t: g[t+1], and gradients of later parameters
        self._waiting = np.append(self._z[1:-1], 0) + self._gradients[1:]
        self._z_slots, self._saved_slots, self._products_slots = self._rounded_sizes()
        self._held_slots = {
            place.to: self._rounded([float(nbytes or 0) for nbytes in place.held_bytes]) for place in problem.places
        }
        self._forward = np.cumsum([0.0, *(stage.dropping_seconds for stage in self._stages)])
        self._dropping = self._z[:-1] + np.array([stage.dropping_bytes for stage in self._stages], dtype=np.int64)
        self._way_slots = self._rounded_ways()
        self._states = [self._states_of(s) for s in range(self._count + 1)]
        self._reach: dict[State, tuple[int, ...]] = {"need": problem.reach}
        if problem.rounds:
            self._reach["near"] = problem.rounded_reach
        self._starts = {end: sorted({0, *reach}) for end, reach in self._reach.items()}
        # by s, t and m; where t < s-1 there is nothing
        shape = self._count + 1, self._count, slots + 1
        states = _STATES if problem.rounds else _STATES[:3]
        self._best: dict[State, Array] = {state: np.empty(shape, dtype=np.float32) for state in states}
        self._inverted: dict[State, Array] = {end: np.empty(shape, dtype=np.float32) for end in self._reach}
        # the fewest slots that are enough, by s and t
        self._enough: dict[State, Slots] = {state: np.zeros(shape[:2], dtype=np.int32) for state in states}
        self._fill()

    def _fill(self) -> None:
        runs = {
            end: np.full((len(starts), self._count, self.slots + 1), np.inf, dtype=np.float32)
            for end, starts in self._starts.items()
        }
        for s in range(self._count, -1, -1):
            for end, rows in runs.items():
                if s < self._count:
                    self._extend(rows[:, s:], s, end)
            for state in reversed(self._states[s]):  # a checkpoint may come back rounded
                self._fill_cells(s, state)
                times = self._best[state][s, max(0, s - 1) :]
                self._enough[state][s, max(0, s - 1) :] = times.shape[1] - np.isfinite(times).sum(1)
            for end, rows in runs.items():  # a run may end with block s-1: z[s] is then exact
                if end in self._states[s]:
                    _lower(rows[:, s - 1 :], self._best[end][s, s - 1 :])

    def seconds(self, m: int) -> float:
        """Least time of a step with ``m`` slots; infinite where there is none."""
        return float(self._best["hold"][0, -1, m]) + self._problem.head_seconds

    def least(self) -> int | None:
        """The fewest slots in which a step is possible."""
        feasible = np.flatnonzero(np.isfinite(self._best["hold"][0, -1]))
        return int(feasible[0]) if len(feasible) else None

    def steps(self) -> list[int]:
        """The fewest slots for each different time, fewest first."""
        times = self._best["hold"][0, -1]
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

    def _rounded_sizes(self) -> tuple[list[int], list[int], dict[Selective, list[int]]]:
        """Slots of z[0..L], and of what each block saves, all of it or results of its products."""
        saved = [float(stage.saved_bytes) for stage in self._stages]
        exact = [float(self._z[0]), *(x for pair in zip(saved, self._z[1:], strict=True) for x in pair)]
        rounded, kept = self._rounded(exact), [{s.how: s.products_bytes for s in st.selections} for st in self._stages]
        products = {how: self._rounded([float(found.get(how, 0)) for found in kept]) for how in SELECTIVE}
        return rounded[0::2], rounded[1::2], products

    def _rounded(self, exact: list[float]) -> list[int]:
        if self._rounding == "down":
            slots = np.floor(np.array(exact) / self.unit_bytes)
        else:
            slots = np.diff(np.rint(np.cumsum([0.0, *exact]) / self.unit_bytes))
        return [int(x) for x in np.minimum(slots, self.slots + 1)]

    def _rounded_ways(self) -> list[dict[Inversion, int]]:
        """Slots of what each block keeps for each way of inverting it."""
        held = [{way.how: way.held_bytes for way in stage.ways} for stage in self._stages]
        slots = {how: self._rounded([float(ways.get(how, 0)) for ways in held]) for how in INVERSIONS}
        return [{how: slots[how][i] for how in ways} for i, ways in enumerate(held)]

    def _thresholds(self, nbytes: Bytes) -> Slots:
        """Slots without which ``nbytes`` do not fit; one too many stands for all above."""
        slots = np.minimum(nbytes / self.unit_bytes, self.slots + 1)
        return (np.floor(slots) if self._rounding == "down" else np.ceil(slots - 0.5)).astype(np.int32)

    def _threshold(self, nbytes: int) -> int:
        return int(self._thresholds(np.array([nbytes]))[0])

    def _states_of(self, s: int) -> list[State]:
        """Those in which anybody may ask for z[s]."""
        states: list[State] = ["free"] if s > 0 else []
        if s > 0 and self._stages[s - 1].ways:
            states.append("need")
        before = self._stages[s - 1]
        if s == 0 or before.keeps_output or any(selection.keeps_output for selection in before.selections):
            states.append("hold")
        if self._problem.rounds:
            states += ["near"] if "need" in states else []
            states += [_WHEN_ROUNDED[state] for state in states if state in ("free", "near")]
            states += ["hold rounded"] if "hold" in states and s > 0 else []
        return states

    def _own(self, s: int, state: State) -> tuple[int, int]:
        """Bytes and slots of z[s], none where somebody else holds it."""
        return (0, 0) if state in _HOLD else (int(self._z[s]), self._z_slots[s])

    # --- the recursion. Of k and t one is a number and the other a slice: the table asks for every t at once, the
    # schedule for every k. Times are in a row for each of them, without the first columns if those are all infinite

    def _fill_cells(self, s: int, state: State) -> None:
        """``best(s, t, m)`` for all t and m, where all later s are known, and earlier states of this."""
        cells, columns = self._best[state][s], slice(0, self.slots + 1)
        if s > 0:  # nothing is left but the loss, or g[s] is there
            own, _ = self._own(s, state)
            least = self._problem.head_bytes if s == self._count else int(self._waiting[s - 1])
            cells[s - 1] = 0.0
            cells[s - 1, : self._threshold(own + least)] = np.inf
        if s == self._count:
            return
        cells[s:] = np.inf
        for _, times in self._moves(s, state, slice(s, self._count), columns):
            _lower(cells[s : s + len(times)], times)
        checkpoints = list(self._checkpoints(s, state))
        for k in range(s + 1, self._count):
            for _, part, back in checkpoints:
                _lower(cells[k:], self._between(part, s, back, k, slice(k, self._count), columns))

    def _moves(self, s: int, state: State, t: slice, columns: slice) -> Iterator[tuple[Move, Array]]:
        """Those without a k."""
        for move, part in self._storing(s, state):
            yield move, self._times(part, s + 1, t, columns)
        stage = self._stages[s]
        if stage.recompute_seconds is not None and t.start == s < self._count - 1:
            own, _ = self._own(s, state)
            times = np.full((1, columns.stop - columns.start), stage.recompute_seconds, dtype=np.float32)
            least = self._threshold(own + int(self._waiting[s]) + stage.recompute_bytes)
            times[0, : max(0, least - columns.start)] = np.inf
            yield _RECOMPUTE, times
        if state == "free" and stage.ways:
            for end, inverted in self._inverted.items():
                yield _INVERT[end], inverted[s, t, columns]

    def _storing(self, s: int, state: State) -> Iterator[tuple[Move, _Part]]:
        """Ways to run block s and keep what its way back needs."""
        stage, output = self._stages[s], int(self._z[s + 1])
        own, own_slots = self._own(s, state)
        kept, kept_slots = (own, own_slots) if stage.keeps_input or state in _NEED else (0, 0)

        def part(keeps_output: bool, slots: int, seconds: float, forward: int, backward: int) -> _Part:
            shared, shared_slots = (output, self._z_slots[s + 1]) if keeps_output else (0, 0)
            return _Part(
                after=_next(state, held=keeps_output),
                held_slots=slots + shared_slots,
                seconds=np.full((self._count + 1, 1), seconds, dtype=np.float32),
                beside_bytes=np.full(self._count + 1, own + forward),
                alone_bytes=np.full(self._count + 1, shared + output + backward + self._gradients[s + 1]),
            )

        yield (
            _STORE,
            part(
                stage.keeps_output,
                kept_slots + self._saved_slots[s],
                stage.forward_all_seconds + stage.backward_seconds,
                stage.forward_all_bytes,
                kept + stage.saved_bytes + stage.backward_bytes,
            ),
        )
        for selection in stage.selections:
            yield (
                _SELECTIVE[selection.how],
                part(
                    selection.keeps_output,
                    own_slots + self._products_slots[selection.how][s],
                    selection.forward_seconds + selection.backward_seconds,
                    selection.forward_bytes,
                    own + selection.products_bytes + selection.backward_bytes,
                ),
            )

    def _checkpoints(self, s: int, state: State) -> Iterator[tuple[Move, _Part, State]]:
        """Ways to keep z[s] while blocks k..t are done, and the state in which blocks s..k-1 find it."""
        stage = self._stages[s]
        if stage.recompute_seconds is None:
            return
        own, own_slots = self._own(s, state)
        passes = np.zeros((self._count + 1, 1), dtype=np.float32)
        passes[s + 1 :, 0] = stage.forward_seconds + self._forward[s + 1 :] - self._forward[s + 1]
        later = np.zeros(self._count + 1, dtype=np.int64)
        later[s + 2 :] = np.maximum.accumulate(self._dropping[s + 1 :])
        after = _next(state, held=False)
        first = own + stage.forward_bytes
        yield _CHECKPOINT, _Part(after, own_slots, passes, np.maximum(first, own + later), np.zeros_like(later)), state
        if state in _HOLD:
            return
        for place in self._problem.places:
            held, back = place.held_bytes[s], state if place.exact else _WHEN_ROUNDED.get(state)
            if held is None or back is None:
                continue
            leaving = max(first, own + held + int(self._z[s + 1]))
            seconds = passes + np.float32(2 * own * place.seconds_per_byte)
            beside, alone = np.maximum(leaving, later + held), own + held + self._z + self._gradients
            yield (
                Move("checkpoint", place=place),
                _Part(after, self._held_slots[place.to][s], seconds, beside, alone),
                back,
            )

    def _between(self, part: _Part, s: int, back: State, k: int | slice, t: int | slice, columns: slice) -> Array:
        """Of blocks s..t with z[s] kept while blocks k..t are done."""
        before = k - 1 if isinstance(k, int) else slice(k.start - 1, k.stop - 1)
        return self._times(part, k, t, columns, self._best[back][s, before, columns])

    def _times(self, part: _Part, k: int | slice, t: int | slice, columns: slice, rest: Array | None = None) -> Array:
        """Of blocks k..t with what the move holds beside them, of the move, and the rest in the same columns."""
        low, high = min(max(columns.start, part.held_slots), columns.stop), columns.stop
        others = part.seconds[k] if rest is None else part.seconds[k] + rest[..., low - columns.start :]
        times = self._best[part.after][k, t, low - part.held_slots : high - part.held_slots] + others
        least = self._thresholds(np.maximum(self._waiting[t] + part.beside_bytes[k], part.alone_bytes[k]))
        # most moves need less for themselves than what they hold and the blocks after them do
        short = least > self._enough[part.after][k, t] + part.held_slots
        for row in short.nonzero()[0].tolist():
            times[row, : max(0, int(least[row]) - low)] = np.inf
        return times

    # --- runs of inversions: rows[c, t] is the least time from z[s] on if the run begins at one of the blocks from
    # self._starts[end][c] to the next of those, between which it makes no difference

    def _extend(self, rows: Array, s: int, end: State) -> None:
        """From z[s+1] to z[s], block s among those that are inverted, if that is not too far from the run's end."""
        ways, starts = self._stages[s].ways, self._starts[end]
        first, last = (bisect.bisect_right(starts, start) - 1 for start in (self._reach[end][s], s))
        rows[: first if ways else last + 1] = np.inf
        if ways:
            after = rows[first : last + 1]
            after[:] = functools.reduce(_lower, [self._through(after, slice(s, self._count), s, way) for way in ways])
            self._inverted[end][s, s:] = rows[last]

    def _through(self, after: Array, t: slice, i: int, way: Way) -> Array:
        """The times from z[i] on, from those from z[i+1] on, where block i is inverted in that way."""
        slots = self._way_slots[i][way.how]
        backward = 2 * self._z[i + 1] + way.held_bytes + way.peak_bytes + self._gradients[i + 1]
        least = self._thresholds(np.maximum(self._z[i] + way.forward_bytes + self._waiting[t], backward))
        times, left = np.empty_like(after), max(0, self.slots + 1 - slots)
        np.add(after[..., :left], np.float32(way.forward_seconds + way.seconds), out=times[..., slots:])
        times[..., :slots] = np.inf
        for row, m in enumerate(least.tolist()):
            if m > slots:
                times[..., row, :m] = np.inf
        return times

    def _run(self, t: int, s: int, end: State, m: int) -> tuple[list[Way], int]:
        """How blocks s, s+1, ... are inverted in the run behind :attr:`_inverted`, and the slots that are left."""
        stop = s
        while stop <= t and self._stages[stop].ways and self._reach[end][stop] <= s:
            stop += 1
        ending, only = self._best[end][:, t], slice(t, t + 1)
        times = {stop: ending[stop : stop + 1]}  # by block, as the rows above for a run that began at s
        for i in reversed(range(s, stop)):
            through = [self._through(times[i + 1], only, i, way) for way in self._stages[i].ways]
            times[i] = functools.reduce(np.minimum, through if i == s else [*through, ending[i : i + 1]])
        chosen: list[Way] = []
        for i in range(s, stop):
            if chosen and ending[i, m] <= times[i][0, m]:
                break
            ways = self._stages[i].ways
            chosen.append(min(ways, key=lambda way: self._through(times[i + 1], only, i, way)[0, m]))
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
        is_free = state in ("free", "free rounded")
        if move.kind in ("store", "selective"):
            part = dict(self._storing(s, state))[move]
            output_held = part.after in _HOLD
            steps += _pass(s, s, "all" if move.kind == "store" else SELECTIVE[move.how], again=again)
            if is_free and move.kind == "store":
                steps.append(Free(s))
            self._emit(steps, t, s + 1, part.after, m - part.held_slots)
            if output_held:
                steps.append(Free(s + 1))
            steps.append(Backward(s, "saved" if move.kind == "store" else move.how))
            if is_free and move.kind == "selective":
                steps.append(Free(s))
        elif move.kind == "checkpoint":
            part, back = next((part, back) for found, part, back in self._checkpoints(s, state) if found == move)
            steps += _pass(s, s, "input", again=again)
            if move.place is not None:
                steps.append(Offload(s, move.place.to))
            steps += _pass(s + 1, k - 1, "nothing", again=again)
            self._emit(steps, t, k, part.after, m - part.held_slots)
            if move.place is not None:
                steps.append(Fetch(s))
            self._emit(steps, k - 1, s, back, m)
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
        columns = slice(m, m + 1)
        found = [(_time(times[0]), move, s) for move, times in self._moves(s, state, slice(t, t + 1), columns)]
        for move, part, back in self._checkpoints(s, state) if t > s else ():
            times = self._between(part, s, back, slice(s + 1, t + 1), t, columns)
            if times.shape[1]:
                row = int(times[:, 0].argmin())
                found.append((float(times[row, 0]), move, s + 1 + row))
        seconds, move, k = min(found, key=lambda one: one[0])
        assert np.isfinite(seconds)
        return move, k


def _next(state: State, *, held: bool) -> State:
    """Of a later block's input, as z[s] is in ``state``; ``held``: somebody else holds it."""
    if state in _EXACT:
        return "hold" if held else "free"
    return "hold rounded" if held else "free rounded"


def _lower(known: Array, times: Array) -> Array:
    """The smaller of each two times, in place of those known; ``times`` may begin with a later column."""
    later = known[..., known.shape[-1] - times.shape[-1] :]
    np.minimum(later, times, out=later)
    return known


def _time(times: Array) -> float:
    """The one in it, or infinity."""
    return float(times[0]) if len(times) else math.inf


def _pass(first: int, last: int, keep: Keep, *, again: bool) -> list[Instruction]:
    if not again:
        return [Forward(i, keep) for i in range(first, last + 1)]
    return [Recompute(first, last, keep)] if first <= last else []


def _with_update(step: Instruction) -> list[Instruction]:
    return [step, Update(step.block)] if isinstance(step, Backward) else [step]
