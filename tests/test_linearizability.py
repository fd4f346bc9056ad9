"""The check for linearizability, on histories written by hand: 1, 2, 3 are moments, a and b values."""

import random

import pytest

from tests.support.linearizability import NEVER, Operation, first_lost, first_violation


def read(start: float, end: float, value: int | None) -> Operation:
    return Operation(start, end, value)


def write(start: float, end: float, value: int) -> Operation:
    """An acknowledged write."""
    return Operation(start, end, value, is_write=True)


def failed(start: float, end: float, value: int) -> Operation:
    """A write that was answered 503, or never."""
    return Operation(start, end, value, is_write=True, is_certain=False)


LINEARIZABLE = {
    "nothing": [],
    "read after a write": [write(1, 2, 7), read(3, 4, 7)],
    "reads during a write, old then new": [write(1, 2, 7), write(3, 9, 8), read(4, 5, 7), read(6, 7, 8)],
    "two writers, first one last": [write(1, 5, 7), write(2, 4, 8), read(6, 7, 7)],
    "failed write that happened": [write(1, 2, 7), failed(3, 6, 8), read(4, 5, 7), read(7, 8, 8)],
    "failed write that did not happen": [write(1, 2, 7), failed(3, 4, 8), read(5, 6, 7)],
    "failed write, overwritten": [failed(1, 5, 7), read(2, 3, 7), write(4, 6, 8), read(7, 8, 8)],
    "write without an answer, late": [write(1, 2, 7), failed(3, NEVER, 8), read(5, 6, 7), read(7, 8, 8)],
    "write without an answer, over a later one": [failed(1, NEVER, 7), write(2, 3, 8), read(4, 5, 8), read(6, 7, 7)],
    "value written twice": [write(1, 2, 7), write(3, 4, 8), write(5, 6, 7), read(7, 8, 7)],
}
NOT_LINEARIZABLE = {
    "lost": [write(1, 2, 7), read(3, 4, None)],
    "value nobody wrote": [write(1, 2, 7), read(3, 4, 8)],
    "stale": [write(1, 2, 7), write(3, 4, 8), read(5, 6, 7)],
    "read before it was sent": [read(1, 2, 7), write(3, 4, 7)],
    "new then old during a write": [write(1, 2, 7), write(3, 9, 8), read(4, 5, 8), read(6, 7, 7)],
    "new then old during a failed write": [write(1, 2, 7), failed(3, 9, 8), read(4, 5, 8), read(6, 7, 7)],
    "two writers, each read last": [write(1, 5, 7), write(2, 4, 8), read(6, 7, 8), read(8, 9, 7)],
    "failed write that happened after its answer": [write(1, 2, 7), failed(3, 4, 8), read(5, 6, 7), read(7, 8, 8)],
    "failed write over a later one": [failed(1, 2, 7), write(3, 4, 8), read(5, 6, 7)],
    "shown, then gone": [write(1, 2, 7), failed(3, 6, 8), read(4, 5, 8), read(7, 8, 7)],
    "write without an answer, shown, then gone": [failed(1, NEVER, 8), read(2, 3, 8), read(4, 5, None)],
}


@pytest.mark.parametrize("name", LINEARIZABLE)
def test_linearizable_history_passes(name: str) -> None:
    assert first_violation(LINEARIZABLE[name]) is None


@pytest.mark.parametrize("name", NOT_LINEARIZABLE)
def test_history_that_is_not_linearizable_is_noticed(name: str) -> None:
    assert first_violation(NOT_LINEARIZABLE[name]) is not None


def test_operation_that_no_order_explains_is_named() -> None:
    stale = read(5, 6, 7)
    assert first_violation([write(7, 8, 9), stale, write(1, 2, 7), write(3, 4, 8), read(9, 10, 9)]) == stale


@pytest.mark.parametrize("seed", range(2))
def test_long_history_of_a_real_register_passes_and_fails_with_one_stale_read(seed: int) -> None:
    generator = random.Random(seed)
    value: int | None = None
    history: list[Operation] = []
    for number in range(1, 2000):  # each operation takes effect at its number, and overlaps with some others
        start, end = number - generator.random() * 3, number + generator.random() * 3
        if generator.random() < 0.3:
            value = number
            history.append(write(start, end, number))
        elif generator.random() < 0.1:
            history.append(failed(start, end, -number))
        else:
            history.append(read(start, end, value))
    assert first_violation(history) is None
    assert first_violation([*history, read(1500, 1501, history[100].value)]) is not None


@pytest.mark.parametrize(
    ("history", "survivors"),
    [
        ([write(1, 2, 7), write(3, 4, 8), read(5, 6, 7)], [read(7, 8, 8)]),  # stale
        ([write(1, 2, 7), failed(3, 4, 8)], [read(5, 6, 7)]),
        ([write(1, 2, 7), failed(3, 4, 8)], [read(5, 6, 8)]),
        ([write(1, 4, 7), write(2, 3, 8)], [read(5, 6, 7)]),
        ([write(1, 2, 6), failed(3, 4, 7), failed(7, 8, 7), read(7, 8, 7)], [read(5, 6, 6)]),  # the second 7 was read
        ([], [read(1, 2, None)]),
    ],
)
def test_survivor_without_a_loss_passes(history: list[Operation], survivors: list[Operation]) -> None:
    assert first_lost(history, survivors) is None


@pytest.mark.parametrize(
    ("history", "survivors"),
    [
        ([write(1, 2, 7)], [read(3, 4, None)]),
        ([write(1, 2, 7), write(3, 4, 8)], [read(5, 6, 7)]),
        ([write(1, 2, 7), failed(3, 4, 8), read(5, 6, 8)], [read(7, 8, 7)]),  # shown, then gone
        ([write(1, 2, 7), failed(3, 4, 8), read(5, 6, 8), write(9, 10, 9)], [read(7, 8, 7), read(11, 12, 9)]),
        ([failed(1, 2, 7), write(3, 4, 8)], [read(5, 6, 7)]),
        ([write(1, 2, 7)], [read(3, 4, 8)]),
    ],
)
def test_survivor_with_a_loss_is_noticed(history: list[Operation], survivors: list[Operation]) -> None:
    assert first_lost(history, survivors) is not None
