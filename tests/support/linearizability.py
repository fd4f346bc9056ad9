"""Check the history of a register, such as a user's date of birth, for linearizability."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NEVER = float("inf")


class Operation(NamedTuple):
    """A read or a write of a register.

    Attributes:
        start: when it was sent, in seconds.
        end: when it was answered; NEVER if it was not.
        value: what was read or written; None is the value before the first write.
        is_write: whether it is a write.
        is_certain: whether it took effect; a write that is not certain did so between its start and its end, or never.
    """

    start: float
    end: float
    value: int | None
    is_write: bool = False
    is_certain: bool = True


State = tuple[frozenset[int], int | None]  # which of the pending operations took effect, and the register's value


def take_effect(index: int, states: set[State], pending: Iterable[int], operations: Sequence[Operation]) -> set[State]:
    """Return the states in which an operation has just taken effect, or had before.

    Any of the other pending operations may take effect before it, in any order.
    """
    reached: set[State] = set()
    seen = set(states)
    found = list(states)
    while found:
        done, value = state = found.pop()
        if index in done:
            reached.add(state)
            continue
        for other in pending:
            operation = operations[other]
            next_state = (done | {other}, operation.value)
            if other in done or next_state in seen or not (operation.is_write or operation.value == value):
                continue
            seen.add(next_state)
            found.append(next_state)
    return reached


def first_violation(history: Iterable[Operation]) -> Operation | None:
    """Return the first operation that no order explains; None if the history is linearizable.

    It follows all possible states from event to event (Lowe, "Testing for linearizability", 2017, "just-in-time"). An
    operation that has ended must have taken effect by then, or, if it is not certain, never does. A write that is not
    certain and that no operation read makes no difference.
    """
    history = list(history)
    read = {operation.value for operation in history if not operation.is_write}
    operations = [operation for operation in history if operation.is_certain or operation.value in read]
    starts = [(operation.start, False, index) for index, operation in enumerate(operations)]
    ends = [(operation.end, True, index) for index, operation in enumerate(operations) if operation.end < NEVER]
    pending: set[int] = set()
    states: set[State] = {(frozenset(), None)}
    for _, has_ended, index in sorted(starts + ends):
        if not has_ended:
            pending.add(index)
            continue
        reached = take_effect(index, states, pending, operations)
        pending.remove(index)
        ignored = set() if operations[index].is_certain else {state for state in states if index not in state[0]}
        states = {(done - {index}, value) for done, value in reached | ignored}
        if not states:
            return operations[index]
    return None


def first_lost(history: Iterable[Operation], survivors: Iterable[Operation]) -> Operation | None:
    """Return None if reads of the server that survives miss no write that was acknowledged or read.

    The other reads may return older values: they are stale, but nothing is lost.

    Args:
        history: the other operations; its reads tell only which writes took effect.
        survivors: the reads of that server.
    """
    history = list(history)
    written = Counter(operation.value for operation in history if operation.is_write)
    read = {operation.value for operation in history if not operation.is_write and written[operation.value] == 1}
    writes = [
        operation._replace(is_certain=operation.is_certain or operation.value in read)
        for operation in history
        if operation.is_write
    ]
    return first_violation([*writes, *survivors])
