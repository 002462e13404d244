"""An all-reduce simulated message by message, its closed forms, and buckets of gradients that are exchanged in turn.

A message occupies its sender's outgoing port and its receiver's incoming port for size / bandwidth seconds, and has
arrived a latency later. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Link(NamedTuple):
    """``latency`` in seconds a message; ``bandwidth`` in bytes a second, each way at once."""

    latency: float
    bandwidth: float


class Message(NamedTuple):
    """Sent when the messages numbered ``needs`` have arrived."""

    source: int
    target: int
    size: float
    needs: tuple[int, ...]


def simulate(messages: Sequence[Message], link: Callable[[int, int], Link]) -> float:
    """Seconds until the last message has arrived. Messages that wait for one port go in the order they became ready."""
    waiting = [len(message.needs) for message in messages]
    ready_at = [0.0] * len(messages)
    after: list[list[int]] = [[] for _ in messages]
    for number, message in enumerate(messages):
        for needed in message.needs:
            after[needed].append(number)
    ready = [(0.0, number) for number, count in enumerate(waiting) if count == 0]
    sends: dict[int, float] = {}
    receives: dict[int, float] = {}
    last = 0.0
    while ready:
        time, number = heapq.heappop(ready)
        source, target, size, _ = messages[number]
        latency, bandwidth = link(source, target)
        start = max(time, sends.get(source, 0.0), receives.get(target, 0.0))
        sends[source] = receives[target] = start + size / bandwidth
        arrived = sends[source] + latency
        last = max(last, arrived)
        for other in after[number]:
            waiting[other] -= 1
            ready_at[other] = max(ready_at[other], arrived)
            if waiting[other] == 0:
                heapq.heappush(ready, (ready_at[other], other))
    if any(waiting):
        raise ValueError(f"messages wait for each other: {sum(map(bool, waiting))} were never sent")
    return last


def ring(ranks: int, size: float) -> list[Message]:
    """A reduce-scatter, then an all-gather: 2 (ranks - 1) rounds of one chunk a rank to its neighbour."""
    return [
        Message(rank, (rank + 1) % ranks, size / ranks, ((step - 1) * ranks + (rank - 1) % ranks,) if step else ())
        for step in range(2 * (ranks - 1))
        for rank in range(ranks)
    ]


def tree(ranks: int, size: float) -> list[Message]:
    """A binomial tree: sums go up to rank 0, the result comes down. ``ranks`` is a power of two."""
    if ranks & (ranks - 1):
        raise ValueError(f"ranks must be a power of two, got {ranks}")
    messages: list[Message] = []
    ups: dict[int, int] = {}
    for rank in range(ranks - 1, 0, -1):
        bit = rank & -rank
        children = tuple(ups[rank + low] for low in _below(bit))
        ups[rank] = len(messages)
        messages.append(Message(rank, rank - bit, size, children))
    summed = tuple(ups[low] for low in _below(ranks))
    downs: dict[int, int] = {}
    for bit in reversed(_below(ranks)):
        for rank in range(bit, ranks, 2 * bit):
            downs[rank] = len(messages)
            messages.append(Message(rank - bit, rank, size, (downs[rank - bit],) if rank > bit else summed))
    return messages


def _below(bit: int) -> list[int]:
    """The powers of two below a power of two."""
    return [1 << n for n in range(bit.bit_length() - 1)]


def ring_seconds(ranks: int, size: float, link: Link) -> float:
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def tree_seconds(ranks: int, size: float, link: Link) -> float:
    return 2 * math.log2(ranks) * (link.latency + size / link.bandwidth)


def in_turn(buckets: Iterable[tuple[float, float]]) -> float:
    """When the last of (ready at, seconds) ends: one all-reduce at a time, in this order, each once it is ready."""
    end = 0.0
    for ready, seconds in buckets:
        end = max(end, ready) + seconds
    return end
