from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.data.order import Order, generator


@given(number=st.integers(1, 20), batch_size=st.integers(1, 45), seed=st.integers(0, 3))
def test_after_any_number_of_epochs_all_items_came_equally_often(number: int, batch_size: int, seed: int) -> None:
    order = Order(number=number, batch_size=batch_size, seed=seed)
    batches = [order.batch(step) for step in range(number)]
    assert {len(batch) for batch in batches} == {batch_size}
    stream = torch.cat(batches).tolist()
    for epoch in range(batch_size):
        assert Counter(stream[epoch * number : (epoch + 1) * number]) == Counter(range(number))


@given(number=st.integers(1, 20), batch_size=st.integers(1, 45), steps=st.lists(st.integers(0, 60), max_size=8))
def test_a_step_does_not_depend_on_the_steps_asked_for_before(number: int, batch_size: int, steps: list[int]) -> None:
    used = Order(number=number, batch_size=batch_size, seed=1)
    for step in steps:  # backwards, too: a killed run asks for a step it has had
        assert torch.equal(used.batch(step), Order(number=number, batch_size=batch_size, seed=1).batch(step))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [Order(number=50, batch_size=50, seed=seed).batch(step).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_generators_differ_by_seed_purpose_and_number() -> None:
    keys = [(0, "order", 0), (1, "order", 0), (0, "view", 0), (0, "order", 1), (0, "order 0", 1)]
    drawn = {int(torch.randint(2**60, (1,), generator=generator(*key))) for key in keys}
    assert len(drawn) == len(keys)
    one, other = (torch.rand(3, generator=generator(5, "view", 7)) for _ in range(2))
    assert torch.equal(one, other)
