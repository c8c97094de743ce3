"""What an error of a save refers to, let go of: a failed save must not keep the state that it was to save."""

from __future__ import annotations

import logging

from ..errors import TailorError

__all__ = ["forget_frames"]

logger = logging.getLogger(__name__)


def forget_frames(error: BaseException) -> None:
    """Take the tracebacks from an error of ours and from what caused it; they are logged, for whoever wants them.

    The variables of their frames hold the plan of the save, with clones of buffers and of small tensors, for as long as
    anybody keeps the error, or a handle that has it. Other errors keep theirs: they are faults of ours, to be looked
    into, and a training ends of them.
    """
    if not isinstance(error, TailorError):
        return
    logger.debug("where a save failed", exc_info=error)
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__  # not its context, which may be an error that the caller is handling
