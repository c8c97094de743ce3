"""The vote on one save of many ranks: each posts its own, the coordinator decides, all learn the verdict.

    rank     cast -----------------------------> wait --> published, or the fault and whose it is
    rank 0   cast --> count (waits for all) -+-> announce
                                             +-> fail

Called by the engine's commit thread; ``fail`` by any. Whatever happens, it ends before its deadline.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ..errors import FormatError, TailorError, WriteError
from ..manifest import Manifest
from ..ranks import LateError, Ranks
from ..storage import SharedCheckpoint
from ..votes import (
    Fault,
    Verdict,
    Vote,
    Whereabouts,
    apply_verdict,
    decode_message,
    digest_schema,
    encode_message,
    judge,
    merge_votes,
    say_elsewhere,
    summarize,
    to_line,
)

__all__ = ["Ballot", "Outcome", "find_elsewhere", "make_vote"]

logger = logging.getLogger(__name__)

# After the coordinator's own deadline: sealing, publishing, a slow network.
_GRACE_SECS = 15.0
# A directory of a network file system may show a new file only after so long.
_VISIBLE_SECS = 10.0
# All ranks look for the same earlier files at about the same time.
_OTHERS_SECS = 5.0
# A few kilobytes need no longer, whatever the files may need.
_POST_SECS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a rank learns of a published save."""

    manifest: Manifest
    """On the coordinator whole; on the others with their own files alone."""
    digest: str
    """Of the whole one."""


class Ballot:
    """The vote on one save.

    Args:
        ranks: All that vote.
        key: Of the save, the same on every rank and for no other save.
        step: Of the checkpoint.
        directory: The run.
        choice: Digest of what this rank is going to write.
        timeout_secs: How long a rank that is done waits for the others.
        newest: Step of the run's newest checkpoint, and its manifest's digest, as this rank knows it.
        known: Keys of all saves that this rank ever voted on.
        lost: Layers that earlier saves found lost and none has written since.
    """

    def __init__(
        self,
        ranks: Ranks,
        key: str,
        *,
        step: int,
        directory: Path,
        choice: str,
        timeout_secs: float,
        newest: Callable[[], tuple[int, str] | None],
        known: Collection[str] = (),
        lost: Collection[str] = (),
    ) -> None:
        self.ranks = ranks
        self.key = key
        self.step = step
        self.obsolete: Sequence[Ballot] = ()
        """Those whose messages can go when this one is published."""
        self.is_forgotten = False
        """Its messages are removed."""
        self._newest = newest
        self._choice = choice
        self._directory = directory
        self._timeout_secs = timeout_secs
        self._post_secs = min(_POST_SECS, timeout_secs)
        self._known = known
        self._lost = lost
        self._mutex = threading.Lock()
        self._has_spoken = False
        """This rank's last word is posted: its vote or, on the coordinator, the verdict."""
        self._own: Vote | None = None
        self._staged: SharedCheckpoint | None = None
        """Once something of this rank may be in the common directory."""
        self._fault: Fault | None = None
        """On the coordinator, what the votes show."""
        self.verdict: Verdict | None = None
        """Once it is known."""

    @property
    def _whereabouts(self) -> Whereabouts:
        return Whereabouts(key=self.key, step=self.step, name=self._vote().name)

    def cast(self, staged: SharedCheckpoint, manifest: Manifest) -> None:
        """Hand over this rank's files, and vote for the save.

        Args:
            staged: Everything of the rank is in it.
            manifest: As this rank describes the save, with its own files alone.

        Raises:
            WriteError: The files could not be handed over, or the vote not be posted; or the others gave the save up.
        """
        self._own = vote = self._vote(manifest)
        encoded, self._staged = encode_message(vote), staged
        try:
            staged.deliver(vote.model_dump_json().encode())
        except WriteError:
            # Whoever gives a save up removes what is common, also under the hands of a rank that is late.
            if not self.ranks.is_coordinator and (verdict := self.peek()) is not None:
                self._raise_if_failed(verdict)
            raise
        with self._mutex:
            if not self.ranks.is_coordinator:
                self._has_spoken = True
            self._post_vote(encoded, "voted")

    def _post_vote(self, encoded: bytes, counter: str) -> None:
        self.ranks.post(
            self._vote_key(self.ranks.rank),
            encoded,
            counter=self._counter(counter),
            status=encode_message(self._whereabouts),
            timeout_secs=self._post_secs,
        )

    def _vote(self, own: Manifest | None = None, *, error: str | None = None, lost: tuple[str, ...] = ()) -> Vote:
        return make_vote(
            self.ranks.rank, self.step, self._directory, choice=self._choice, own=own, error=error, lost=lost
        )

    def count(self, staged: SharedCheckpoint, own: Manifest) -> Manifest:
        """Wait for all votes, and make the manifest of them. On the coordinator.

        Raises:
            WriteError: A rank failed, is late, or disagrees; nothing may be published.
        """
        assert self._own is not None
        started = time.monotonic()
        votes = self._collect()
        fault = judge(self._own, votes, size=self.ranks.size, waited_secs=time.monotonic() - started)
        if fault is None:
            fault = find_elsewhere(staged, votes)
        elif fault.kind == "rank-late":
            fault = self._find_stray({*range(self.ranks.size)} - {*votes}) or fault
        if fault is None:
            try:
                return merge_votes(own, votes)
            except ValidationError as err:
                text = f"what they wrote is no whole checkpoint: {err.errors(include_url=False)[0]['msg']}"
                fault = Fault(kind="ranks-disagree", text=text)
        self._fault = fault
        raise fault.to_error(self.step)

    def _collect(self) -> Mapping[int, Vote]:
        counters = [self._counter("voted"), self._counter("failed")]
        try:
            self.ranks.wait_for_count(
                counters, lambda counts: counts[0] >= self.ranks.size or counts[1] > 0, self._timeout_secs
            )
        except LateError:
            logger.warning("not all ranks voted for checkpoint-%d", self.step)
        return self._take_votes()

    def _take_votes(self) -> Mapping[int, Vote]:
        keys = {self._vote_key(rank): rank for rank in range(self.ranks.size)}
        found = self.ranks.take_those_there(keys, timeout_secs=min(60.0, self._timeout_secs))
        return {keys[key]: self._read_vote(keys[key], data) for key, data in found.items()}

    def _read_vote(self, rank: int, data: bytes) -> Vote:
        try:
            vote = decode_message(Vote, data)
            if vote.rank == rank:
                return vote
            found = f"it is one of rank {vote.rank}"
        except FormatError as err:
            found = to_line(err.found)
        text = f"its vote cannot be read ({found}); all ranks must run the same version of llmtailor"
        return self._vote(error=text).model_copy(update={"rank": rank, "host": "host unknown", "pid": 0})

    def _find_stray(self, absent: Collection[int]) -> Fault | None:
        """A rank that is not late but votes on another save, which this one does not know."""
        try:
            found = self.ranks.statuses(sorted(absent), timeout_secs=min(5.0, self._timeout_secs))
            others = [decode_message(Whereabouts, data) for _, data in sorted(found.items())]
        except TailorError:
            return None
        strays = [each for each in others if each.key not in self._known]
        text = say_elsewhere(self._whereabouts, strays[0]) if strays else ""
        return Fault(kind="ranks-disagree", text=text) if strays else None

    def announce(self, manifest: Manifest, digest: str) -> None:
        """Tell all ranks that the save is published. On the coordinator; never raises."""
        verdict = Verdict(
            step=self.step,
            error=None,
            parent_step=manifest.step,
            parent=digest,
            layers=summarize(manifest),
        )
        if self._announce(verdict):
            for ballot in self.obsolete:
                ballot._forget()
        self.obsolete = ()

    def _announce(self, verdict: Verdict) -> bool:
        with self._mutex:
            if self._has_spoken:
                return True
            self._has_spoken = True
        self.verdict = verdict
        status = encode_message(self._whereabouts)
        try:
            self.ranks.post(self._verdict_key, encode_message(verdict), status=status, timeout_secs=self._post_secs)
        except TailorError as err:
            logger.warning("the other ranks could not be told what became of checkpoint-%d: %s", self.step, err)
            return False
        return True

    def wait(self, own: Manifest) -> Outcome:
        """Wait for the verdict. Not on the coordinator.

        Args:
            own: As this rank describes the save.

        Raises:
            WriteError: It was not published, and why; or nothing is known of it.
        """
        timeout_secs = 2 * self._timeout_secs + _GRACE_SECS
        try:
            data = self.ranks.take(self._verdict_key, timeout_secs=timeout_secs)
        except LateError as err:
            if stray := self._find_stray([0]):
                raise stray.to_error(self.step) from err
            raise WriteError(
                f"nothing is known of checkpoint-{self.step}: rank 0 did not say what became of it",
                kind="rank-late",
                expected=f"a verdict within {timeout_secs:.0f} s",
                found=err.found,
                hint="look at rank 0: is it alive, is its disk slow?",
            ) from err
        self.verdict = verdict = self._read_verdict(data)
        self._raise_if_failed(verdict)
        assert verdict.parent is not None
        self._say_heard()
        return Outcome(manifest=apply_verdict(own, verdict), digest=verdict.parent)

    def _say_heard(self) -> None:
        try:
            self.ranks.raise_counter(self._counter("heard"), timeout_secs=self._post_secs)
        except TailorError as err:
            logger.debug("rank 0 was not told that the end of checkpoint-%d was heard of: %s", self.step, err)

    def wait_until_heard(self, timeout_secs: float) -> None:
        """Wait until all ranks know that the save is published, if it is. On the coordinator; never raises."""
        if self.verdict is None or self.verdict.error is not None:
            return
        try:
            self.ranks.wait_for_count(
                [self._counter("heard")], lambda counts: counts[0] >= self.ranks.size - 1, timeout_secs
            )
        except LateError as err:
            logger.warning("not all ranks heard that checkpoint-%d is published: %s", self.step, err)

    def _read_verdict(self, data: bytes) -> Verdict:
        try:
            return decode_message(Verdict, data)
        except FormatError as err:
            text = f"what rank 0 says of it cannot be read ({to_line(err.found)})"
            raise Fault(kind="ranks-disagree", text=text).to_error(self.step) from err

    def tidy_up(self, verdict: Verdict) -> None:
        """Remove what this rank handed over after the others had given the save up. Never raises."""
        if verdict.error is not None and self._staged is not None:
            self._staged.discard_common()
        self._staged = None

    def _raise_if_failed(self, verdict: Verdict) -> None:
        self.tidy_up(verdict)
        if verdict.error is None:
            return
        raise WriteError(verdict.error, kind=verdict.kind or "rank-failed", hint=_HINT)

    def peek(self, *, timeout_secs: float = 2.0) -> Verdict | None:
        """The verdict, if it has come meanwhile; waits a moment at most. Never raises."""
        if self.verdict is None:
            try:
                found = self.ranks.take_those_there([self._verdict_key], timeout_secs=timeout_secs)
                for data in found.values():
                    self.verdict = self._read_verdict(data)
            except WriteError as err:
                logger.warning("what became of checkpoint-%d is not known: %s", self.step, err)
        return self.verdict

    def fail(self, error: BaseException, *, lost: Sequence[str] = (), waits: bool = True) -> None:
        """Say that this rank's part of the save failed; more than once is fine. Never raises; any thread.

        Args:
            error: What stopped it.
            lost: See ``Vote.lost``.
            waits: Hear what the coordinator makes of it, for a while: the next save is planned with that.
        """
        try:
            if self.ranks.is_coordinator:
                self._announce(self._verdict_on(error, lost))
            elif self._post_failure(error, lost) and waits:
                self.verdict = self._read_verdict(
                    self.ranks.take(self._verdict_key, timeout_secs=self._timeout_secs + _GRACE_SECS)
                )
        except Exception as err:  # whoever ends the save has to go on, whatever this is
            logger.warning("checkpoint-%d failed here, and of the other ranks nothing is known: %s", self.step, err)

    def _verdict_on(self, error: BaseException, lost: Sequence[str]) -> Verdict:
        fault = self._fault
        if fault is None:
            text = f"{self._vote().name} failed: {_describe(error)}"
            fault = Fault(kind="rank-failed", text=text, lost=tuple(lost))
        told = fault.to_error(self.step)
        all_lost = {*fault.lost, *self._lost, *(self._find_lost_elsewhere() if fault.lost else ())}
        parent = self._newest() or (None, None)
        return Verdict(
            step=self.step,
            error=told.what,
            kind=told.kind,
            lost=tuple(sorted(all_lost)),
            parent_step=parent[0],
            parent=parent[1],
        )

    def _find_lost_elsewhere(self) -> set[str]:
        """What other ranks miss: one rank at a time, each would cost a save."""
        size = self.ranks.size - (self._own is None)
        counters = [self._counter("voted"), self._counter("failed")]
        try:
            self.ranks.wait_for_count(
                counters, lambda counts: sum(counts) >= size, min(_OTHERS_SECS, self._timeout_secs)
            )
        except LateError:
            logger.debug("not all ranks said which files they miss of those before checkpoint-%d", self.step)
        try:
            return {layer for vote in self._take_votes().values() for layer in vote.lost}
        except LateError:
            return set()

    def _post_failure(self, error: BaseException, lost: Sequence[str]) -> bool:
        with self._mutex:
            if self._has_spoken:
                return False
            self._has_spoken = True
        vote = self._vote(error=_describe(error), lost=tuple(lost))
        self._post_vote(encode_message(vote), "failed")
        return True

    def _forget(self) -> None:
        """Remove its messages."""
        votes = [self._vote_key(rank) for rank in range(self.ranks.size)]
        try:
            self.ranks.drop(
                [*votes, *map(self._counter, ("voted", "failed", "heard")), self._verdict_key],
                timeout_secs=self._post_secs,
            )
            self.is_forgotten = True
        except TailorError as err:
            logger.warning("messages of checkpoint-%d were not removed: %s", self.step, err)

    def _vote_key(self, rank: int) -> str:
        return f"{self.key}/vote/{rank}"

    def _counter(self, name: str) -> str:
        return f"{self.key}/{name}"

    @property
    def _verdict_key(self) -> str:
        return f"{self.key}/verdict"


def make_vote(
    rank: int,
    step: int,
    directory: Path,
    *,
    choice: str,
    own: Manifest | None = None,
    error: str | None = None,
    lost: tuple[str, ...] = (),
) -> Vote:
    """This process's vote on a save.

    Args:
        rank: Its number.
        step: Of the checkpoint.
        directory: The run.
        choice: Digest of what it was going to write.
        own: The save as it describes it, with its own files alone; None if it came to nothing.
        error: What stopped its part.
        lost: See ``Vote.lost``.
    """
    try:
        store = str(directory.resolve())
    except (OSError, RuntimeError):  # links that go round in a circle
        store = str(directory)
    return Vote(
        rank=rank,
        step=step,
        host=socket.gethostname(),
        pid=os.getpid(),
        store=to_line(store),
        choice=choice,
        schema_digest="" if own is None else digest_schema(own),
        parent=None if own is None or own.parent is None else own.parent.digest,
        layers=() if own is None else tuple(layer for layer in own.layers if layer.files),
        files=() if own is None else own.files,
        error=error,
        lost=lost,
    )


def find_elsewhere(staged: SharedCheckpoint, votes: Mapping[int, Vote]) -> Fault | None:
    """A rank whose directory has our directory's name and is another: on another machine, or mounted over."""
    deadline = time.monotonic() + _VISIBLE_SECS
    while missing := staged.find_missing_votes(votes):
        if time.monotonic() > deadline:
            vote = votes[missing[0]]
            text = f"{vote.name} writes to {vote.store}, which is not the directory that rank 0 knows by that name"
            return Fault(kind="ranks-disagree", text=text)
        time.sleep(0.1)
    return None


def _describe(error: BaseException) -> str:
    return to_line(error) or type(error).__name__


_HINT = "the next save works when the fault is gone; older checkpoints are intact"
