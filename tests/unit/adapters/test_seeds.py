"""Task sets of seeds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.adapters.seeds import HELD_OUT, rows_of, seed_of, seeded_splits


@given(num_train=st.integers(1, 1 << 20), num_validation=st.integers(0, 1 << 20), seed=st.integers(0, HELD_OUT - (1 << 20)))
def test_no_seed_is_trained_on_and_held_out(num_train: int, num_validation: int, seed: int):
    splits = seeded_splits("game", num_train=num_train, num_validation=num_validation, seed=seed)
    assert (len(splits["train"]), len(splits["validation"])) == (num_train, num_validation)
    assert splits["train"][-1]["seed"] < HELD_OUT <= HELD_OUT + seed == splits["validation"].first
    assert splits["train"][0]["seed"] == seed


def test_rows_have_stable_ids_and_slices_are_rows():
    rows = seeded_splits("game", num_train=5, num_validation=1, seed=7)["train"]
    assert rows[-1] == {"id": "game/11", "seed": 11}
    assert list(rows[1:3]) == [{"id": "game/8", "seed": 8}, {"id": "game/9", "seed": 9}]
    assert [row["seed"] for row in rows] == [7, 8, 9, 10, 11]
    with pytest.raises(IndexError):
        rows[5]


@pytest.mark.parametrize(
    ("numbers", "key"),
    [
        ({"num_train": 0}, "args.num_train = 0 must be a whole number from 1 on"),
        ({"num_validation": -1}, "args.num_validation = -1"),
        ({"seed": -1}, "args.seed = -1"),
        ({"num_train": "9"}, "args.num_train = '9'"),
        ({"seed": True}, "args.seed = True"),
        ({"seed": HELD_OUT}, "add up to more than"),
        ({"num_validation": HELD_OUT + 1}, "add up to more than"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_name(numbers: dict[str, int], key: str):
    with pytest.raises(ValueError, match=key):
        seeded_splits("game", **{"num_train": 4, "num_validation": 4, "seed": 0, **numbers})


def test_an_unknown_split_is_answered_with_the_known_ones():
    splits = seeded_splits("game", num_train=1, num_validation=1, seed=0)
    with pytest.raises(ValueError, match=r"no split 'valdation'. Did you mean 'validation'\?"):
        rows_of(splits, "valdation", source="game")


@pytest.mark.parametrize("task", [{}, {"seed": -1}, {"seed": "1"}, {"seed": 1.0}, {"seed": True}])
def test_a_row_without_a_seed_is_refused(task: dict[str, object]):
    with pytest.raises(ValueError, match="'seed' must be a whole number from 0 on"):
        seed_of(task, source="game")
