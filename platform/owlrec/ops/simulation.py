"""A fleet at work, played event by event: machines come, are lost and go; shards are begun, lost and done.

It shares nothing with the formula of planning.py but the inputs, and so checks it: the formula takes means, where this
draws the moment of each loss and each shard's size. The autoscaler is Ray's in outline: it asks for machines while
shards wait, up to the fleet's, replaces those that the cloud takes, and gives back what has been idle for long enough.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import numpy as np

_HOPELESS = 4.0  # losses within a shard's time: it would be begun some fifty times
_Event = Literal["there", "ready", "done", "lost", "idle"]


@dataclass(frozen=True)
class SimulatedGroup:
    """Engines of one sort, each on machines of its own."""

    engines: int
    shard_s: float  # engine time of a shard of mean size
    shards_at_once: int = 1  # that share an engine's batch: each then takes as many times longer
    provision_s: float = 0.0  # until a machine that was asked for is there; not paid
    startup_s: float = 0.0  # from there to an engine that takes shards; paid
    losses_per_hour: float = 0.0  # of one machine that is there
    idle_timeout_s: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """What became of it."""

    wall_s: float  # until the last shard was done
    paid_s: list[float]  # by group, over all of its engines
    losses: list[int]  # by group, of machines
    lost_s: float  # of engine time that was done again


@dataclass
class _Engine:
    group: int
    there: float = 0.0
    ready: bool = False
    gone: bool = False
    shards: dict[int, float] = field(default_factory=dict)  # shard -> when it was begun


class _Fleet:
    def __init__(self, groups: Sequence[SimulatedGroup], shards: int, spread: float, seed: int) -> None:
        self.groups, self._random = groups, np.random.default_rng(seed)
        self.sizes = np.maximum(0.01, 1 + spread * self._random.standard_normal(shards))
        self.sizes /= self.sizes.mean()
        self.waiting = deque(range(shards))
        self.left, self.now, self.lost_s = shards, 0.0, 0.0
        self.paid, self.losses = [0.0] * len(groups), [0] * len(groups)
        self.running = [0] * len(groups)  # machines that are there or asked for
        self.idle: list[deque[_Engine]] = [deque() for _ in groups]
        self._events: list[tuple[float, int, _Event, _Engine, int]] = []
        self._number = count()

    def play(self) -> Simulated:
        wall = 0.0
        self.scale_up()
        while self._events:
            self.now, _, event, engine, shard = heapq.heappop(self._events)
            if engine.gone:
                continue
            if event == "there":
                self.machine_there(engine)
            elif event == "ready":
                engine.ready = True
                self.give_work(engine)
            elif event == "done":
                if engine.shards.pop(shard, None) is None:
                    continue
                self.left -= 1
                wall = self.now
                self.give_work(engine)
            elif event == "lost":
                self.lose(engine)
            elif event == "idle" and not engine.shards and not self.waiting:
                self.let_go(engine)
        return Simulated(wall, self.paid, self.losses, self.lost_s)

    def at(self, delay: float, event: _Event, engine: _Engine, shard: int = -1) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._number), event, engine, shard))

    def scale_up(self) -> None:
        """Asks for machines while more shards wait than those that are coming will take."""
        wanted = len(self.waiting)
        for number, group in enumerate(self.groups):
            coming = min(group.engines - self.running[number], -(-wanted // group.shards_at_once))
            for _ in range(coming):
                self.running[number] += 1
                self.at(group.provision_s, "there", _Engine(number))

    def machine_there(self, engine: _Engine) -> None:
        group = self.groups[engine.group]
        engine.there = self.now
        self.at(group.startup_s, "ready", engine)
        if group.losses_per_hour:
            self.at(self._random.exponential(3600 / group.losses_per_hour), "lost", engine)

    def give_work(self, engine: _Engine) -> None:
        group = self.groups[engine.group]
        while self.waiting and len(engine.shards) < group.shards_at_once:
            shard = self.waiting.popleft()
            engine.shards[shard] = self.now
            self.at(group.shard_s * self.sizes[shard] * group.shards_at_once, "done", engine, shard)
        if not engine.shards:
            self.idle[engine.group].append(engine)
            self.at(group.idle_timeout_s, "idle", engine)

    def lose(self, engine: _Engine) -> None:
        self.losses[engine.group] += 1
        at_once = self.groups[engine.group].shards_at_once
        self.lost_s += sum(self.now - begun for begun in engine.shards.values()) / at_once
        self.waiting.extendleft(engine.shards)
        self.let_go(engine)
        for idle in self.idle:
            while self.waiting and idle:
                free = idle.popleft()
                if not free.gone and not free.shards:
                    self.give_work(free)
        if self.waiting:
            self.scale_up()

    def let_go(self, engine: _Engine) -> None:
        engine.gone = True
        self.running[engine.group] -= 1
        self.paid[engine.group] += self.now - engine.there


def simulate(groups: Sequence[SimulatedGroup], shards: int, *, spread: float = 0.05, seed: int = 0) -> Simulated:
    """Plays one job of so many shards.

    spread: standard deviation of a shard's size, as a share of the mean; hashed ids of n rows a shard give n ** -0.5.
    Time and memory: some 3 events a shard. Raises ValueError where no group has an engine, or a group's engines are
    lost faster than they finish a shard.
    """
    if not shards or not sum(group.engines for group in groups):
        raise ValueError(f"{shards} shards on {sum(g.engines for g in groups)} engines: there is nothing to play")
    for group in groups:
        if group.losses_per_hour / 3600 * (group.shard_s * group.shards_at_once + group.startup_s) > _HOPELESS:
            raise ValueError(
                f"{group.losses_per_hour:g} losses an hour leave no time for a shard of {group.shard_s:,.0f} s"
            )
    return _Fleet(groups, shards, spread, seed).play()
