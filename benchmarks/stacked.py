"""Stacks of networks as contenders: alone, or in chunks in two processes, as `study.py` trains."""

import functools

import plain
import torch
from plain import Task, Times, measure, problem_of

import config
from models import FeedforwardClassifier
from training import ENGINES, BatchOrder, count_correct, gather, random_start


class Stack:
    """S seeds × V variants, with the steps of `training.train`: each seed gathers batches of its own."""

    def __init__(self, task: Task, engine: str, seeds: int, variants: int = 1, device: str = "cpu"):
        self.problem, rows = problem_of(task, device)
        self.batch, self.networks = task.batch, seeds * variants
        start = {name: value.unsqueeze(1).repeat_interleave(variants, 1) for name, value in starts(task, seeds).items()}
        template = FeedforwardClassifier(task.size, task.classes).to(device)
        self.engine = ENGINES[engine](template, {name: value.to(device) for name, value in start.items()}, 1e-3)
        self.rooms = {}
        self.order = BatchOrder(range(seeds), "benchmark", rows)
        self.sums, self.rates = torch.zeros(2, seeds, variants, device=device), {}

    def shuffle(self) -> None:
        self.batches = self.order.next_epoch().split(self.batch, dim=1)

    def steps(self, first: int, last: int) -> None:
        loss_sum, right_sum = self.sums
        for batch in self.batches[first:last]:
            features = gather(self.problem.features, batch, self.rooms)
            loss, right = self.engine.step(features, self.problem.labels[batch], self.rates)
            loss_sum += loss * batch.shape[1]
            right_sum += right

    def validate(self) -> None:
        """Right answers per cell, and whether the weights are finite."""
        for value in self.engine.params.values():
            value.isfinite().flatten(2).all(2)
        count_correct(self.engine, self.problem)


@functools.lru_cache(maxsize=1)
def starts(task: Task, seeds: int) -> dict[str, torch.Tensor]:
    """Random networks: their making is no part of what is measured."""
    return random_start(range(seeds), "fresh_start", (task.size, task.classes, config.HIDDEN_SIZES))


class InTurn:
    """Stacks one after the other, as one contender."""

    def __init__(self, stacks: list[Stack]):
        self.stacks, self.networks = stacks, sum(stack.networks for stack in stacks)

    def shuffle(self) -> None:
        for stack in self.stacks:
            stack.shuffle()

    def steps(self, first: int, last: int) -> None:
        for stack in self.stacks:
            stack.steps(first, last)

    def validate(self) -> None:
        for stack in self.stacks:
            stack.validate()


def measure_chunks(
    mine: int, of: int, task: Task, engine: str, seeds: int, variants: int, steps: int, limit: float
) -> tuple[int, Times]:
    """The part of process `mine` (from 0) of `of`: networks, and times of an epoch.

    `seeds` seeds are cut into chunks of at most `SEEDS_PER_CHUNK`, one per process or more, of nearly the same length;
    the processes take them in turn.
    """
    count = of * -(-seeds // (of * config.SEEDS_PER_CHUNK))
    lengths = [seeds * (i + 1) // count - seeds * i // count for i in range(count)][mine::of]
    loop = InTurn([Stack(task, engine, length, variants) for length in lengths])
    taken = min(steps, task.steps) if seeds * variants > plain.LARGE else task.steps
    return loop.networks, measure(loop, task, taken, limit, together=plain.together)
