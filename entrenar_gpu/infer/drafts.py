"""Prompt-lookup speculation: what followed the same words before is tried as a draft, and verified in one pass.

Leviathan et al. (arXiv 2211.17192) accept a draft token x with probability min(1, p(x) / q(x)) and otherwise draw from
the normalised max(0, p - q). A draft that is looked up is certain, q(x) = 1, and the rule becomes: draw y from p; while
y = x go on to the next draft token, else y stands and the rest of the draft is dropped. So the sampler that draws
without drafts is the rule, with the same random numbers: text is the same with drafts and without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

LONGEST_MATCH, SHORTEST_MATCH = 3, 2
LONGEST_DRAFT = 8


class NgramIndex:
    """Where each n-gram of a growing sequence last ended, so that looking up a draft takes the same time always."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        # The n-grams that end before this token: they now have something that follows.
        end = len(self._tokens)
        for n in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
            if end >= n:
                self._ends[tuple(self._tokens[end - n :])] = end
        self._tokens.append(token)

    def draft(self, longest: int) -> list[int]:
        """Up to `longest` tokens that followed the last 3 tokens, or else the last 2, where they stood before."""
        end = len(self._tokens)
        for n in range(min(LONGEST_MATCH, end), SHORTEST_MATCH - 1, -1):
            found = self._ends.get(tuple(self._tokens[end - n :]))
            if found is not None:
                return self._tokens[found : found + longest]
        return []


class Speculation:
    """Decides how long drafts may be, from what steps with drafts and without take and what they yield.

    A step's cost is the median of the last few of its way: one that compiled a kernel, or was held up, does not count.
    The way that loses is tried now and then: texts come to what repeats and leave it again. Times decide about speed
    alone, never about text.
    """

    SAMPLES, FEWEST = 9, 3  # steps that the median is of; steps before it is believed
    KEEP = 0.9  # of the yield's average, with each step
    PATIENCE = 32  # steps of one way before a trial of the other

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.drafted = self.accepted = 0  # tokens
        self._seconds: dict[bool, deque[float]] = {way: deque(maxlen=self.SAMPLES) for way in (False, True)}
        self._yield = 1.0 + LONGEST_DRAFT / 2  # tokens per sequence of a step with drafts
        self._since = {False: 0, True: 0}  # steps since the last of its way

    def longest(self) -> int:
        """Longest draft for the next step; 0 for none."""
        if not self.enabled or len(self._seconds[False]) < self.FEWEST:
            return 0
        if len(self._seconds[True]) < self.FEWEST:
            return LONGEST_DRAFT
        pays = self._yield * median(self._seconds[False]) > median(self._seconds[True])
        trial = self._since[not pays] >= self.PATIENCE
        return LONGEST_DRAFT if pays != trial else 0

    def stepped(self, seconds: float, sequences: int, drafted: int, told: int) -> None:
        """A step took `seconds` for `sequences`, tried `drafted` tokens in all, and yielded `told`."""
        with_drafts = drafted > 0
        self._seconds[with_drafts].append(seconds)
        self._since = {way: 0 if way is with_drafts else n + 1 for way, n in self._since.items()}
        if with_drafts:
            self.drafted += drafted
            self.accepted += max(told - sequences, 0)
            self._yield = self.KEEP * self._yield + (1 - self.KEEP) * told / sequences
