"""Shuffles that are bijections, mixtures that keep their shares, states that continue exactly."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import DataError
from puna.train.data.order import Order
from puna.train.data.permutation import Permutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 100))
def test_a_permutation_visits_everything_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(Permutation(size, seed, epoch)) == list(range(size))


def test_every_order_of_four_is_as_likely() -> None:
    orders = Counter(tuple(Permutation(4, seed)) for seed in range(2400))
    assert len(orders) == 24
    # 100 of each are expected; the chi-square of 23 degrees is below 49.7 in 99.9% of fair cases.
    assert sum((count - 100) ** 2 / 100 for count in orders.values()) < 49.7


def test_every_place_gets_every_row_as_often() -> None:
    size = 10
    places = Counter((place, row) for seed in range(2000) for place, row in enumerate(Permutation(size, 7, seed)))
    # Expected 200 each, standard deviation 13.4; five of those are allowed.
    assert all(abs(places[place, row] - 200) < 67 for place in range(size) for row in range(size))


def test_large_permutations_need_no_memory() -> None:
    permutation = Permutation(10**12, 3)
    found = [permutation[place] for place in range(1000)]
    assert len(set(found)) == 1000
    assert max(found) > 9 * 10**11
    with pytest.raises(IndexError):
        permutation[10**12]


def test_epochs_differ_and_are_repeatable() -> None:
    one, other = Order([5, 3], seed=1), Order([5, 3], seed=1)
    first, second = list(islice(one, 8)), list(islice(one, 8))
    everything = [(0, i) for i in range(5)] + [(1, i) for i in range(3)]
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert list(islice(other, 16)) == first + second
    assert list(Order([5, 3], shuffle=False, epochs=2)) == everything * 2
    assert list(islice(Order([5, 3], seed=2), 8)) != first


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    drawn=st.integers(1, 300),
    seed=st.integers(0, 9),
)
def test_a_mixture_keeps_its_shares_at_any_time(weights: list[float], drawn: int, seed: int) -> None:
    sizes = [3 + i for i in range(len(weights))]
    counts = Counter(source for source, _ in islice(Order(sizes, weights=weights, seed=seed), drawn))
    for source, weight in enumerate(weights):
        # Only one that lags is served, so none is ahead by 1; the lags sum to 0, so none is behind by n - 1.
        lag = drawn * weight / sum(weights) - counts[source]
        assert -1 - 1e-6 < lag < max(len(weights) - 1, 0) + 1e-6


def test_a_mixture_shuffles_each_source_on_its_own() -> None:
    seen = list(islice(Order([4, 4], weights=[3, 1], seed=5), 16))
    assert sorted(number for source, number in seen if source == 0) == sorted([0, 1, 2, 3] * 3)
    assert sorted(number for source, number in seen if source == 1) == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(weights=st.sampled_from([None, (1.0, 2.5)]), before=st.integers(0, 40))
def test_an_order_goes_on_where_its_state_was_taken(weights: tuple[float, ...] | None, before: int) -> None:
    order = Order([6, 5], weights=weights, seed=9)
    list(islice(order, before))
    state = order.state()
    rest = list(islice(order, 20))
    again = Order([6, 5], weights=weights, seed=9)
    again.restore(state)
    assert list(islice(again, 20)) == rest
    assert (state["epoch"], state["position"]) == divmod(before, 11)


def test_a_state_of_other_data_is_refused() -> None:
    state = Order([6, 5], seed=9).state()
    with pytest.raises(DataError, match="sizes"):
        Order([6, 4], seed=9).restore(state)
    with pytest.raises(DataError, match="seed"):
        Order([6, 5], seed=8).restore(state)
    with pytest.raises(DataError, match="weights"):
        Order([6, 5], seed=9, weights=[1, 1]).restore(state)


@pytest.mark.parametrize(
    ("sizes", "weights"), [([], None), ([0], None), ([1, 1], [1]), ([1], [-1]), ([1], [0]), ([0, 1], [1, 1])]
)
def test_nothing_to_visit_is_refused(sizes: list[int], weights: list[float] | None) -> None:
    with pytest.raises(DataError):
        Order(sizes, weights=weights)
