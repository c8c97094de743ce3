"""A training process of the demo: ``python -m llmtailor.demo.child '<ChildSpec as JSON>'``.

It dies when its parent does: the next event then has no reader.
"""

from __future__ import annotations

import os
import sys

from .events import ChildSpec, Event, encode_event

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Train as told, and report on the pipe."""
    spec = ChildSpec.decode(arguments[0])

    def emit(event: Event) -> None:
        line = memoryview(encode_event(event))
        while line:
            line = line[os.write(spec.events_fd, line) :]

    from .training import train  # seconds of imports, so only in the process that trains

    train(spec, emit)


if __name__ == "__main__":
    main(sys.argv[1:])
