"""The votes on the saves of a run of many ranks: one for each, and what a rank that missed one learns of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .errors import FormatError, NotFoundError
from .ranks import Ranks
from .votes import Verdict
from .writer import Ballot

__all__ = ["Ballots"]

logger = logging.getLogger(__name__)

# Of saves whose messages could not be removed.
_MAX_KEPT = 64
_PART_SECS = 10.0


class Ballots:
    """Called by the training thread of every rank, in the same order.

    Args:
        ranks: All that vote.
        directory: The run.
        timeout_secs: How long a rank that is done with a save waits for the others.
        newest: Step of the run's newest checkpoint, and its manifest's digest, as this rank knows it.
    """

    def __init__(
        self, ranks: Ranks, directory: Path, timeout_secs: float, *, newest: Callable[[], tuple[int, str] | None]
    ) -> None:
        self._ranks = ranks
        self._directory = directory
        self._timeout_secs = timeout_secs
        self._newest = newest
        self._num_attempts: Counter[int] = Counter()
        """By step."""
        self._ballots: list[Ballot] = []
        """Those whose messages are still there, oldest first."""
        self._keys: set[str] = set()
        """Of all that were ever opened."""
        self._lost: frozenset[str] = frozenset()
        """Layers that were found lost, and not written since."""
        self._is_left = False
        """Training went on from another checkpoint since the last save."""

    def begin(self, step: int) -> int:
        """A save of this step is tried; returns how often it was before, which is the same on every rank."""
        self._num_attempts[step] += 1
        return self._num_attempts[step] - 1

    def open(self, step: int, attempt: int, choice: str) -> Ballot:
        """The vote on a save.

        Args:
            step: Of the checkpoint.
            attempt: What ``begin`` said.
            choice: Digest of what this rank is going to write.
        """
        ballot = Ballot(
            self._ranks,
            _key(step, attempt),
            step=step,
            directory=self._directory,
            choice=choice,
            timeout_secs=self._timeout_secs,
            newest=self._newest,
            known=self._keys,
            lost=self._lost,
        )
        self._keys.add(ballot.key)
        self._is_left = False
        # A rank that was late looks for the verdict on the last save; those before that are done with.
        kept = [each for each in self._ballots if not each.is_forgotten][-_MAX_KEPT:]
        ballot.obsolete = kept[:-1] if self._ranks.is_coordinator else ()
        self._ballots = [*(kept if self._ranks.is_coordinator else ()), ballot]
        return ballot

    def fail(self, step: int, attempt: int, error: BaseException) -> None:
        """A save failed here before it was captured: tell the other ranks."""
        is_open = bool(self._ballots) and self._ballots[-1].key == _key(step, attempt)
        ballot = self._ballots[-1] if is_open else self.open(step, attempt, "")
        ballot.fail(error, waits=False)

    def catch_up(self, learn: Callable[[Verdict], None]) -> None:
        """Before a save is planned: hear what became of the last one, if this one follows it."""
        if self._is_left or not self._ballots or (verdict := self._ballots[-1].peek()) is None:
            return
        self._ballots[-1].tidy_up(verdict)
        self._lost = frozenset() if verdict.error is None else self._lost | set(verdict.lost)
        try:
            learn(verdict)
        except (NotFoundError, FormatError) as err:
            # The votes on the next save will say so, on every rank.
            logger.warning("checkpoint-%s is published and cannot be opened here: %s", verdict.parent_step, err)

    def leave(self) -> None:
        """Training goes on from another checkpoint: the next save does not follow what the last one came to."""
        self.catch_up(lambda verdict: None)
        self._lost, self._is_left = frozenset(), True

    def part(self) -> None:
        """Before the run is closed: what the last save came to is heard of by all. Never raises.

        Rank 0 may keep the store: if its process ended now, ranks that still listen would not learn that the
        checkpoint is published.
        """
        if self._ballots and self._ranks.is_coordinator:
            self._ballots[-1].wait_until_heard(min(_PART_SECS, self._timeout_secs))


def _key(step: int, attempt: int) -> str:
    return f"save/{step}-{attempt}"
