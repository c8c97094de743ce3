"""Names for the positions of an optimizer: one reading or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.catalog import StateRef
from llmtailor.errors import IncompatibleError
from llmtailor.formats.hf.parameter_order import ParameterOrder, is_spared_decay
from llmtailor.formats.hf.positions import name_positions
from llmtailor.tensor_refs import FileTensor
from llmtailor.tensors import TensorMeta

Shape = tuple[int, ...]

MODEL: dict[str, Shape] = {
    "embed_tokens.weight": (64, 8),
    "layers.0.up.weight": (8, 8),
    "layers.0.up.bias": (8,),
    "layers.0.norm.weight": (8,),
    "layers.1.up.weight": (8, 8),
    "layers.1.up.bias": (8,),
    "layers.1.norm.weight": (8,),
    "norm.weight": (8,),
    "lm_head.weight": (64, 8),
}
DECAYED = [name for name in MODEL if not is_spared_decay(name)]
SPARED = [name for name in MODEL if is_spared_decay(name)]


def state_of(**leaves: Shape) -> StateRef:
    return StateRef(
        tensors={
            leaf: FileTensor(meta=TensorMeta(dtype="F32", shape=shape), extents=()) for leaf, shape in leaves.items()
        }
    )


def adam(name: str) -> StateRef:
    return state_of(step=(), exp_avg=MODEL[name], exp_avg_sq=MODEL[name])


def order_of(names: Sequence[str]) -> ParameterOrder:
    return ParameterOrder(names=tuple(names), undecayed=frozenset(filter(is_spared_decay, names)), origin="a test")


def assign(
    groups: Sequence[Sequence[StateRef | None]],
    *,
    given: Sequence[str] | None = None,
    find_order: Callable[[], ParameterOrder] = lambda: order_of(list(MODEL)),
) -> list[list[str]]:
    named = name_positions(groups, MODEL, find_order=find_order, given=given, path=Path("optimizer.pt"))
    return [list(names) for names in named]


def refuse() -> ParameterOrder:
    raise AssertionError("the order was asked for")


def test_two_groups_are_the_trainers() -> None:
    assert assign([[*map(adam, DECAYED)], [*map(adam, SPARED)]]) == [DECAYED, SPARED]


def test_one_group_is_everything_in_order() -> None:
    assert assign([[*map(adam, MODEL)]]) == [list(MODEL)]


def test_parameters_never_updated_take_their_place() -> None:
    states = [None if name.startswith("layers.0") else adam(name) for name in DECAYED]

    assert assign([states, [None] * len(SPARED)]) == [DECAYED, SPARED]


def test_frozen_parameters_are_found_where_the_shapes_leave_one_way() -> None:
    trained = [name for name in DECAYED if name != "embed_tokens.weight"]

    assert assign([[*map(adam, trained)], [*map(adam, SPARED)]]) == [trained, SPARED]


def test_frozen_parameters_are_refused_where_there_are_two_ways() -> None:
    trained = [name for name in DECAYED if "layers.0" not in name]

    with pytest.raises(IncompatibleError) as caught:
        assign([[*map(adam, trained)], [*map(adam, SPARED)]])

    assert caught.value.kind == "ambiguous-names"
    assert "layers.0.up.weight and layers.1.up.weight" in str(caught.value.found)
    assert "--parameter-names" in str(caught.value.hint)


def test_frozen_parameters_in_a_list_are_named() -> None:
    trained = [name for name in DECAYED if "layers.0" not in name]
    groups = [[*map(adam, trained)], [*map(adam, SPARED)]]

    assert assign(groups, given=[*trained, *SPARED], find_order=refuse) == [trained, SPARED]
    in_model_order = [name for name in MODEL if name in trained or name in SPARED]
    assert assign(groups, given=in_model_order, find_order=refuse) == [trained, SPARED]


def test_list_in_the_models_order_is_sorted_by_the_decay_rule() -> None:
    groups = [[*map(adam, DECAYED)], [*map(adam, SPARED)]]

    assert assign(groups, given=list(MODEL), find_order=refuse) == [DECAYED, SPARED]


def test_list_names_any_number_of_groups_one_after_the_other() -> None:
    parts = [["norm.weight", "lm_head.weight"], ["layers.1.up.weight"], ["layers.0.up.weight", "embed_tokens.weight"]]

    assert (
        assign(
            [[*map(adam, part)] for part in parts], given=[name for part in parts for name in part], find_order=refuse
        )
        == parts
    )


def test_list_that_fits_in_two_ways_is_refused() -> None:
    names = ["layers.1.up.bias", "norm.weight", "layers.0.up.weight", "layers.1.up.weight"]

    with pytest.raises(IncompatibleError) as caught:
        assign([[None, None], [None, None]], given=names, find_order=refuse)

    assert caught.value.kind == "ambiguous-names"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["norm.weight", "norm.weight"], "norm.weight"),
        (["norm.weight", "layers.7.up.weight"], "layers.7.up.weight"),
    ],
)
def test_list_with_a_name_twice_or_unknown_is_refused(names: list[str], found: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        assign([[None, None]], given=names)

    assert (caught.value.kind, caught.value.fqn) == ("bad-name-list", found)


def test_list_that_fits_in_no_way_is_refused() -> None:
    groups = [[adam("norm.weight"), adam("lm_head.weight")]]

    with pytest.raises(IncompatibleError, match="does not fit"):
        assign(groups, given=["lm_head.weight", "norm.weight"])
    with pytest.raises(IncompatibleError, match="does not fit"):
        assign(groups, given=["norm.weight"])


def test_groups_the_trainer_does_not_make_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="groups are not the Trainer's"):
        assign([[adam(name)] for name in MODEL])


def test_wrong_number_of_parameters_is_explained() -> None:
    with pytest.raises(IncompatibleError) as caught:
        assign([[*map(adam, DECAYED), adam("lm_head.weight")], [*map(adam, SPARED)]])

    assert caught.value.found == "5 + 5"
    assert "4 + 5" in str(caught.value.expected)


def test_state_of_another_shape_is_explained() -> None:
    states = [adam(name) for name in DECAYED]
    states[1] = state_of(step=(), exp_avg=(8, 9), exp_avg_sq=(8, 9))

    with pytest.raises(IncompatibleError) as caught:
        assign([states, [*map(adam, SPARED)]])

    assert caught.value.fqn == "layers.0.up.weight"
    assert "position 1 of group 0" in str(caught.value.found)


@pytest.mark.parametrize(
    ("leaves", "fits"),
    [
        ({"row_var": (64, 1), "col_var": (1, 8)}, True),
        ({"row_var": (8, 1), "col_var": (1, 64)}, False),
        ({"exp_avg_sq_row": (64,), "exp_avg_sq_col": (8,), "RMS": ()}, True),
        ({"exp_avg_sq_row": (8,), "exp_avg_sq_col": (64,), "RMS": ()}, False),
        ({"variance": (64,)}, False),
        ({"momentum_buffer": (64, 8)}, True),
        ({"momentum_buffer": (8, 64)}, False),
        ({"quant/codes": (3, 3, 3)}, True),
    ],
)
def test_factored_and_foreign_state_is_judged_by_what_is_known_of_it(leaves: dict[str, Shape], fits: bool) -> None:
    def run() -> list[list[str]]:
        return assign([[state_of(**leaves)]], given=["lm_head.weight"])

    if fits:
        assert run() == [["lm_head.weight"]]
    else:
        with pytest.raises(IncompatibleError):
            run()


@given(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=8), st.data())
def test_a_reading_is_given_exactly_if_it_is_the_only_one(sizes: list[int], data: st.DataObject) -> None:
    names = [f"p{i}" for i in range(len(sizes))]
    shapes = {name: (size,) for name, size in zip(names, sizes, strict=True)}
    kept = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    states = [state_of(exp_avg=shapes[name]) for name, keep in zip(names, kept, strict=True) if keep]
    wished = [state.tensors["exp_avg"].meta.shape for state in states]

    def read() -> tuple[tuple[str, ...], ...]:
        return name_positions(
            [states], shapes, find_order=lambda: order_of(names), given=None, path=Path("optimizer.pt")
        )

    if _count_ways(wished, [shapes[name] for name in names]) == 1:
        assert read() == (tuple(name for name, keep in zip(names, kept, strict=True) if keep),)
        return
    with pytest.raises(IncompatibleError) as caught:
        read()
    assert caught.value.kind == "ambiguous-names"


def _count_ways(wished: Sequence[Shape], shapes: Sequence[Shape]) -> int:
    if not wished:
        return 1
    return sum(_count_ways(wished[1:], shapes[i + 1 :]) for i, shape in enumerate(shapes) if shape == wished[0])
