"""Check the history of a register, such as a user's date of birth, for linearizability."""

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


def first_lost(history: Iterable[Operation], final: int | None) -> Operation | None:
    """Return None if a register's final value shows that no acknowledged write and none that was read is undone.

    Reads of older values are allowed: they are stale, but nothing is lost.
    """
    operations = sorted(history)
    read = {operation.value for operation in operations if not operation.is_write}
    writes: list[Operation] = []
    for operation in operations:
        if operation.is_write:
            writes.append(operation._replace(is_certain=operation.is_certain or operation.value in read))
            read.discard(operation.value)  # where a value was written twice, the first write explains its reads
    moment = max((operation.end for operation in operations if operation.end < NEVER), default=0.0) + 1
    return first_violation([*writes, Operation(moment, moment, final)])
