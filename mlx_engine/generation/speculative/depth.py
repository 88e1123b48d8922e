"""The number of tokens to propose for each verification: fixed, or by what pays.

A cycle of depth k costs c(k) seconds and gives 1 + p1 + p1 p2 + ... + p1..pk tokens, where pj
is the chance that the j-th proposal is accepted once those before it are. Both are measured
while decoding, and the depth with the most tokens a second is used; depth 0 is plain decoding.
What is not in use is tried again now and then, for a small share of the time.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

MAX_AUTO_DEPTH = 4

_RECENT = 9  # cycles whose median time counts
_TRIAL = 5  # cycles of a trial; the first one is not timed, since it begins with catching up
_SHARE = 0.01  # of the time, that trials may cost
_PATIENCE = 2  # by which a wait is longer after fruitless trials
_SHORTEST_WAIT, _LONGEST_WAIT = 24, 512  # tokens between two trials
_FIRST_CHECK, _LAST_CHECK = 24, 192  # tokens until plain decoding is measured again
_MARGIN = 1.08  # by which a deeper cycle must be better than a shallower one
_DECAY = 0.08  # weight of the newest proposal in an acceptance
_DECAY_IN_TRIAL = 0.25
_HOPE = 0.85  # how the chance of a proposal that was never made compares to the one before


class DepthChooser:
    """Chooses a depth for each cycle; it lives as long as its engine, and keeps learning.

    Args:
        depth: proposals for each verification, or ``"auto"``.
    """

    def __init__(self, depth: int | Literal["auto"]) -> None:
        self._fixed = None if depth == "auto" else depth
        self._times: list[deque[float]] = [deque(maxlen=_RECENT) for _ in range(MAX_AUTO_DEPTH + 1)]
        self._accepted: list[float | None] = [None] * MAX_AUTO_DEPTH
        self._best = 0
        self._trying = 0
        self._trial = _TRIAL  # cycles left of the trial that is under way
        self._opening = [0, 1]  # trials that are still to be made at first, the last one first
        self._loss = 0.0  # seconds that this trial has cost so far
        self._wait = 0.0  # seconds until the next one
        self._unchecked = 0  # tokens since plain decoding was last measured
        self._check_after = _FIRST_CHECK

    @property
    def parked(self) -> bool:
        """Whether nothing is proposed at present, because it does not pay."""
        return self._fixed is None and not self._trial and self._best == 0

    def choose(self, most: int) -> int:
        """The depth of the next cycle, at most ``most``."""
        if self._fixed is not None:
            return min(self._fixed, most)
        return min(self._trying if self._trial else self._best, most)

    def record(self, depth: int, seconds: float, accepted: int) -> None:
        """Learn from a cycle of this depth, whose first ``accepted`` proposals were right."""
        if self._fixed is not None:
            return
        in_trial = self._trial > 0 and depth == self._trying
        if not (in_trial and self._trial == _TRIAL):
            self._times[depth].append(seconds)
        for place in range(min(depth, accepted + 1)):
            self._learn(place, accepted > place, _DECAY_IN_TRIAL if in_trial else _DECAY)
        if in_trial:
            self._loss += seconds - (accepted + 1) / max(self._rate(self._best), 1e-9)
            self._trial = 0 if self._hopeless(depth) else self._trial - 1
            if not self._trial:
                self._end_trial()
        elif not self._trial:
            self._best = self._fastest()
            self._wait -= seconds
            self._unchecked = 0 if depth == 0 else self._unchecked + accepted + 1
            if self._best and self._unchecked >= self._check_after:
                self._begin_trial(0)
            elif self._wait <= 0:
                self._begin_trial(self._candidate())

    def _learn(self, place: int, accepted: bool, weight: float) -> None:
        known = self._accepted[place]
        if known is None:  # one proposal says little
            known, weight = 0.5, 0.25
        self._accepted[place] = known + weight * (accepted - known)

    def _begin_trial(self, depth: int | None) -> None:
        if depth is None:
            self._wait = _SHORTEST_WAIT * self._seconds(0)
            return
        # Only what is measured at about the same time can be compared: machines have moods.
        self._times[depth].clear()
        self._trying, self._trial, self._loss = depth, _TRIAL, 0.0

    def _end_trial(self) -> None:
        before, self._best = self._best, self._fastest()
        if self._trying == 0:
            self._unchecked = 0
            confirmed = self._best == before > 0
            self._check_after = (
                min(2 * self._check_after, _LAST_CHECK) if confirmed else _FIRST_CHECK
            )
            if confirmed:
                return
        if self._opening:  # an engine's first tokens are slow, so that plain decoding comes twice
            self._begin_trial(self._opening.pop())
            return
        if self._best != before and (deeper := self._deeper()) is not None:
            self._begin_trial(deeper)
            return
        token = self._seconds(0)
        wait = min(max(self._loss / _SHARE, _SHORTEST_WAIT * token), _LONGEST_WAIT * token)
        self._wait = wait if self._best != before else _PATIENCE * wait

    def _hopeless(self, depth: int) -> bool:
        """Whether it would not pay even if every proposal were right."""
        enough = len(self._times[depth]) > 1  # one may be an accident
        return enough and self._seconds(depth) > (depth + 1) * self._seconds(0)

    def _candidate(self) -> int | None:
        """The depth to try next: what promises to be better, or one less."""
        if self._best == 0:
            return 1
        return self._deeper() or (self._best - 1 or None)

    def _deeper(self) -> int | None:
        """The next depth, if it promises to be better."""
        deeper = self._best + 1
        if deeper > MAX_AUTO_DEPTH or self._rate(deeper) <= self._rate(self._best):
            return None
        return deeper

    def _fastest(self) -> int:
        best, rate = 0, self._rate(0)
        for depth in range(1, MAX_AUTO_DEPTH + 1):
            if self._times[depth] and self._rate(depth) > rate * _MARGIN:
                best, rate = depth, self._rate(depth)
        return best

    def _rate(self, depth: int) -> float:
        """Tokens a second at this depth, as far as known, else as hoped."""
        tokens = chance = 1.0
        for place in range(depth):
            known = self._accepted[place]
            before = self._accepted[place - 1] if place else None
            chance *= known if known is not None else (before if before is not None else 1) * _HOPE
            tokens += chance
        seconds = self._seconds(depth)
        return tokens / seconds if seconds else 0.0

    def _seconds(self, depth: int) -> float:
        """Seconds of a cycle; where never measured, as much more as the step before it."""
        if depth == 0:
            return statistics.median(self._times[0]) if self._times[0] else 0.0
        if self._times[depth]:  # more work is not faster, whatever a noisy machine says
            return max(statistics.median(self._times[depth]), self._seconds(0))
        less = self._seconds(depth - 1)
        step = less - self._seconds(depth - 2) if depth > 1 else 0.0
        return less + max(step, 0.0)
