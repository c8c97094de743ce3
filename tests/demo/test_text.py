from __future__ import annotations

from llmtailor.demo.options import SIZES, DemoOptions
from llmtailor.demo.text import cut_sequences, read_text, split_text


def test_text_is_english_and_large_enough_for_a_default_run() -> None:
    training, validation = split_text(read_text())
    assert training + validation == read_text()
    assert b" the " in validation
    size = DemoOptions().model
    assert len(cut_sequences(training, size.sequence)) >= DemoOptions().steps * size.batch


def test_every_size_gets_its_validation_sequences() -> None:
    _, validation = split_text(read_text())
    for size in SIZES.values():
        sequences = cut_sequences(validation, size.sequence, size.validation_sequences)
        assert len(set(sequences)) == size.validation_sequences
        assert {len(sequence) for sequence in sequences} == {size.sequence}


def test_sequences_do_not_overlap_and_the_rest_is_dropped() -> None:
    assert cut_sequences(b"abcdefgh", 3) == [b"abc", b"def"]
    assert cut_sequences(b"abcdefgh", 2, limit=2) == [b"ab", b"ef"]
