"""Thousands of small networks at once: data on a device, random streams, stacks of networks, and the one loop."""

from engine.cluster import check_cluster
from engine.data import (
    BalancedOrder,
    BatchOrder,
    Network,
    SplitFeatures,
    accuracies,
    generator,
    training_order,
    updates_per_epoch,
)
from engine.functional import Batch, FunctionalEngine, Validation
from engine.gradients import PathRecorder, loss_gradients
from engine.logistic import Linear, fit_linear
from engine.loop import (
    Engine,
    Trained,
    TrainingFailedError,
    classify,
    failure_reason,
    joined,
    raise_failure,
    rows_at_a_time,
    train,
)
from engine.machine import (
    check_memory,
    choose_device,
    default_workers,
    free_memory,
    prepare_machine,
    rank,
    training_memory,
    training_threads,
)
from engine.networks import fit_probes, logistic_regression, make_engine, network_start, random_start
from engine.pure import PureNetwork
from engine.roles import BlockMatrix, Half, block_matrices, tail_halves
from engine.shortcut import ClsShortcut
from engine.stack import FlatAdam, MatmulEngine, Params, Rates
from engine.tail import TailEngine
from engine.workers import groups_of, side_by_side, stacks_at_a_time

__all__ = [
    "BalancedOrder",
    "Batch",
    "BatchOrder",
    "BlockMatrix",
    "ClsShortcut",
    "Engine",
    "FlatAdam",
    "FunctionalEngine",
    "Half",
    "Linear",
    "MatmulEngine",
    "Network",
    "Params",
    "PathRecorder",
    "PureNetwork",
    "Rates",
    "SplitFeatures",
    "TailEngine",
    "Trained",
    "TrainingFailedError",
    "Validation",
    "accuracies",
    "block_matrices",
    "check_cluster",
    "check_memory",
    "choose_device",
    "classify",
    "default_workers",
    "failure_reason",
    "fit_linear",
    "fit_probes",
    "free_memory",
    "generator",
    "groups_of",
    "joined",
    "logistic_regression",
    "loss_gradients",
    "make_engine",
    "network_start",
    "prepare_machine",
    "raise_failure",
    "random_start",
    "rank",
    "rows_at_a_time",
    "side_by_side",
    "stacks_at_a_time",
    "tail_halves",
    "train",
    "training_memory",
    "training_order",
    "training_threads",
    "updates_per_epoch",
]
