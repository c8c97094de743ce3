from __future__ import annotations

import pytest

from llmtailor.demo.events import (
    ChildSpec,
    Event,
    FinishedEvent,
    LossEvent,
    ReadyEvent,
    ResumedEvent,
    SaveEvent,
    SaveFailedEvent,
    encode_event,
    parse_event,
    split_lines,
)

EVENTS: list[Event] = [
    ReadyEvent(num_parameters=3),
    ResumedEvent(step=8, layer_steps={"norm": 8, "lm_head": 4}),
    LossEvent(step=9, loss=2.5),
    SaveEvent(step=12, written_nbytes=100, stall_secs=0.25, total_secs=0.5, num_layers_written=1, num_layers=2),
    SaveFailedEvent(step=16, what="no space\nleft"),
    FinishedEvent(validation_loss=2.25),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_event_survives_the_pipe(event: Event) -> None:
    line = encode_event(event)
    assert line.count(b"\n") == 1
    assert parse_event(line) == event


def test_half_a_line_waits_for_its_end() -> None:
    stream = b"".join(map(encode_event, EVENTS))
    lines, rest = split_lines(stream[:-5])
    assert [parse_event(line) for line in lines] == EVENTS[:-1]
    lines, rest = split_lines(rest + stream[-5:])
    assert [parse_event(line) for line in lines] == EVENTS[-1:]
    assert rest == b""


def test_spec_survives_the_command_line() -> None:
    spec = ChildSpec(
        run="a b/ü", strategy="parity", resume=True, keep=None, steps=8, save_steps=2, size="tiny", seed=0, threads=1
    )
    assert ChildSpec.decode(spec.encode()) == spec
