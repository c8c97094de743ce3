from __future__ import annotations

from typing import Any

import pytest

from llmtailor.demo.options import SIZES, DemoOptions, needed_nbytes, plan_kill_step
from llmtailor.errors import InvalidInputError


@pytest.mark.parametrize("saves", range(4, 40))
@pytest.mark.parametrize("save_steps", [1, 7])
def test_killed_save_has_two_before_it_and_one_after_it(saves: int, save_steps: int) -> None:
    for rest in range(save_steps):
        step = plan_kill_step(saves * save_steps + rest, save_steps)
        assert step % save_steps == 0
        assert 3 <= step // save_steps <= saves - 1


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"steps": 0}, "out-of-range"),
        ({"save_steps": 0}, "out-of-range"),
        ({"seed": -1}, "out-of-range"),
        ({"size": "huge"}, "unknown-size"),
        ({"strategy": "party"}, "unknown-strategy"),
        ({"steps": 31, "save_steps": 8}, "too-few-saves"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields: dict[str, Any], kind: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        DemoOptions(**fields)
    assert caught.value.kind == kind


def test_command_line_has_the_same_defaults_and_sizes() -> None:
    import inspect
    from typing import get_args, get_type_hints

    from llmtailor.cli.demo import demo

    defaults = DemoOptions()
    parameters = inspect.signature(demo).parameters
    assert {name: parameters[name].default for name in DemoOptions.__dataclass_fields__} == {
        name: getattr(defaults, name) for name in DemoOptions.__dataclass_fields__
    }
    assert get_args(get_type_hints(demo)["size"]) == tuple(SIZES)


def test_more_saves_need_more_room() -> None:
    few, many = DemoOptions(steps=40, save_steps=10), DemoOptions(steps=40, save_steps=5)
    assert needed_nbytes(few) > 4 * few.model.state_nbytes
    assert needed_nbytes(many) == needed_nbytes(few) + 4 * few.model.state_nbytes


def test_default_size_takes_50_to_150_megabytes_a_save() -> None:
    assert 50e6 <= DemoOptions().model.state_nbytes <= 150e6
