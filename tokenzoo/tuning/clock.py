"""How much time is left, what the report will take put aside."""

from __future__ import annotations

import time

from .judge import Judge

_ROWS = 5  # that the report has at least, where the search was stopped


class Clock:
    """The time that a search may take.

    Args:
        minutes: for all of it, None for as long as it takes.
        spent: seconds that an earlier start took.
        judge: says how long an image takes.
    """

    def __init__(self, minutes: float | None, spent: float, judge: Judge) -> None:
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes - spent
        self.judge = judge
        self.is_up = False

    def __call__(self) -> bool:
        """Whether the search has to stop now; it stays so."""
        if self.deadline is not None and not self.is_up:
            each = self.judge.seconds / max(1, self.judge.seen)
            report = each * _ROWS * len(self.judge.split.held_out)
            late = time.monotonic() + report > self.deadline
            self.is_up = self.judge.state.world.of_main(late)  # all stop together
        return self.is_up
