"""A fleet at work, played event by event: machines come, are lost and go; shards are begun, lost and done.

An oracle for `owlrec.ops.cost.schedule`, which takes means where this draws the moment of each loss and each shard's
size. The autoscaler is Ray's in outline: it asks for machines while shards wait, up to the fleet's, replaces those that
the cloud takes, and gives back what has been idle for long enough.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np


class Machines(NamedTuple):
    """Engines of one sort, each on machines of its own."""

    engines: int
    shard_s: float  # engine time of a shard of mean size
    in_flight: int = 1  # shards that share an engine's batch: each then takes as many times longer
    provision_s: float = 0.0  # until a machine that was asked for is there; not paid
    startup_s: float = 0.0  # from there to an engine that takes shards; paid
    losses_per_hour: float = 0.0  # of one machine that is there
    idle_timeout_s: float = 0.0


@dataclass
class _Engine:
    group: int
    there: float = 0.0
    gone: bool = False
    shards: dict[int, float] = field(default_factory=dict)  # shard -> when it was begun


class Simulation:
    """One job. After `play`: `wall_s`, `paid_s` and `losses` by group, and `lost_s`, engine time that was repeated."""

    def __init__(self, groups: Sequence[Machines], shards: int, *, spread: float = 0.05, seed: int = 0) -> None:
        """spread: standard deviation of a shard's size, as a share of the mean."""
        self.groups, self._random = groups, np.random.default_rng(seed)
        self.sizes = np.maximum(0.01, 1 + spread * self._random.standard_normal(shards))
        self.sizes /= self.sizes.mean()
        self.waiting, self.now, self.wall_s, self.lost_s = deque(range(shards)), 0.0, 0.0, 0.0
        self.paid_s, self.losses = [0.0] * len(groups), [0] * len(groups)
        self._running = [0] * len(groups)  # machines that are there or asked for
        self._idle: list[deque[_Engine]] = [deque() for _ in groups]
        self._events: list[tuple[float, int, str, _Engine, int]] = []
        self._number = count()

    def play(self) -> "Simulation":
        self._scale_up()
        while self._events:
            self.now, _, event, engine, shard = heapq.heappop(self._events)
            if engine.gone:
                continue
            if event == "there":
                self._machine_there(engine)
            elif event == "ready":
                self._give_work(engine)
            elif event == "done":
                if engine.shards.pop(shard, None) is not None:
                    self.wall_s = self.now
                    self._give_work(engine)
            elif event == "lost":
                self._lose(engine)
            elif event == "idle" and not engine.shards and not self.waiting:
                self._let_go(engine)
        return self

    def _at(self, delay: float, event: str, engine: _Engine, shard: int = -1) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._number), event, engine, shard))

    def _scale_up(self) -> None:
        wanted = len(self.waiting)
        for number, group in enumerate(self.groups):
            for _ in range(min(group.engines - self._running[number], -(-wanted // group.in_flight))):
                self._running[number] += 1
                self._at(group.provision_s, "there", _Engine(number))

    def _machine_there(self, engine: _Engine) -> None:
        group, engine.there = self.groups[engine.group], self.now
        self._at(group.startup_s, "ready", engine)
        if group.losses_per_hour:
            self._at(self._random.exponential(3600 / group.losses_per_hour), "lost", engine)

    def _give_work(self, engine: _Engine) -> None:
        group = self.groups[engine.group]
        while self.waiting and len(engine.shards) < group.in_flight:
            shard = self.waiting.popleft()
            engine.shards[shard] = self.now
            self._at(group.shard_s * self.sizes[shard] * group.in_flight, "done", engine, shard)
        if not engine.shards:
            self._idle[engine.group].append(engine)
            self._at(group.idle_timeout_s, "idle", engine)

    def _lose(self, engine: _Engine) -> None:
        self.losses[engine.group] += 1
        self.lost_s += sum(self.now - begun for begun in engine.shards.values()) / self.groups[engine.group].in_flight
        self.waiting.extendleft(engine.shards)
        self._let_go(engine)
        for idle in self._idle:
            while self.waiting and idle:
                free = idle.popleft()
                if not free.gone and not free.shards:
                    self._give_work(free)
        if self.waiting:
            self._scale_up()

    def _let_go(self, engine: _Engine) -> None:
        engine.gone = True
        self._running[engine.group] -= 1
        self.paid_s[engine.group] += self.now - engine.there
