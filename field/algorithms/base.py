"""What all methods share: hyperparameters, the `Algorithm` that every method extends, and the methods by name.

Everything a method does in a step is a pure function of one network: tensors in, tensors out, nothing kept on the
object. `engine.FunctionalEngine` runs it under `torch.func.vmap`, so that all seeds and trials train at once. Therefore
- what a method remembers (moments of Adam, averages, whose turn it is) is in `state`, a nested dictionary of tensors;
- random numbers come in as `noise`, drawn outside (`Algorithm.draw`);
- a branch that depends on a tensor is a `torch.where`;
- a hyperparameter in which the networks of a stack differ is a tensor as well (`Hyperparameter.tensor`).

`Algorithm` documents shapes and types of what a method can override; the overrides do not repeat them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from config import InputError, Settings
from engine import Batch, Params, PureNetwork
from field.algorithms.parts import State, adam, adam_state

Noise = dict[str, Tensor]  # random numbers of one network and one step


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter of a method.

    Attributes:
        default: value in trial 0.
        meaning: what it does, with its unit.
        search: NumPy generator -> a value, the distribution of random search; None = never searched.
        tensor: whether trials that differ in it can be trained in one stack. It must be a number then, and the
            functions that run under `vmap` must work with a scalar tensor in its place: no `if`, `round` or shape may
            depend on it there. By default trials with different values are trained one after the other.

    Raises:
        InputError: `tensor` for a text.
    """

    default: float | int | str
    meaning: str
    search: Callable[[np.random.Generator], float | int | str] | None = None
    tensor: bool = False

    def __post_init__(self) -> None:
        if self.tensor and isinstance(self.default, str):
            raise InputError(f"The hyperparameter '{self.default}' ({self.meaning}) is a text: it cannot be a tensor.")


def log_uniform(low: float, high: float) -> Callable[[np.random.Generator], float]:
    """``10 ** U(low, high)``."""
    return lambda rng: float(10 ** rng.uniform(low, high))


def uniform(low: float, high: float) -> Callable[[np.random.Generator], float]:
    """``U(low, high)``."""
    return lambda rng: float(rng.uniform(low, high))


def power_of_two(low: float, high: float) -> Callable[[np.random.Generator], int]:
    """``2 ** U(low, high)``, rounded down."""
    return lambda rng: int(2 ** rng.uniform(low, high))


def choice(*values: float | int | str) -> Callable[[np.random.Generator], float | int | str]:
    """One of `values`, all equally likely."""
    return lambda rng: values[int(rng.integers(len(values)))]


@dataclass(frozen=True)
class Setup:
    """What a method knows about the training it is used in.

    Attributes:
        network: what is trained.
        domains: number of source domains.
        batch_size: images per step (pooled), or per step and domain (balanced).
        steps_per_epoch: updates in an epoch.
        epochs: passes over the data (in balanced training: as many updates as pooled training would take).
        backbone_rate: learning rate of trained blocks, as a fraction of that of all else.
    """

    network: PureNetwork
    domains: int
    batch_size: int
    steps_per_epoch: int
    epochs: int
    backbone_rate: float = 1.0

    @property
    def features(self) -> int:
        """D, the length of a feature vector."""
        return self.network.feature_size

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.network.num_classes

    @property
    def width(self) -> int:
        """h, the length of the representation: of the last hidden layer, or of the features if there is none."""
        return self.network.width

    @property
    def steps(self) -> int:
        """Updates in the whole training."""
        return self.steps_per_epoch * self.epochs


class Algorithm:
    """A way to train a network. This class itself is empirical risk minimization (Vapnik 1998).

    To add a method, extend it and override what differs: usually `loss`; `gradients`, if the direction of the step is
    not the gradient of a loss; `update`, if the step is not Adam's; `logits`, if prediction differs.

    Args:
        setup: the training.
        values: hyperparameters by name; the others have their defaults.

    Attributes:
        hyperparameters: name -> `Hyperparameter`, declared by this class; those of its base classes are added. Their
            values are attributes of the object, by the same names: numbers; but in the functions under `vmap`, scalar
            tensors where trials differ in a hyperparameter that is declared with ``tensor=True``, as learning rate and
            weight decay are here. (A class that needs them as numbers declares them again without.)
        version: number of the method's code, written with its results. Raise it when you change what the method
            computes: results of different versions are not mixed. (Comments, docstrings and defaults need no new
            version; the values of the hyperparameters are compared by themselves.)
        batches: "pooled" (source domains mixed, as in Phase 2) or "balanced" (equally many rows of each domain).
        control: name in `study.CONTROLS` of how the method's mask is made; None = the method has no mask. The mask is
            in the state: "mask", name of the tracked matrix -> bool, True = marked.
        phase1: other entries of the state that are made from Phase 1 of the source domains before training: name of the
            entry -> what it is, a name of `field.phase1.PHASE1`.
        routed: whether the method has experts and a `routing`.
        record_names: entries of the state that are kept with the results.
        validate_every: fraction of an epoch after which `validated` is called with the loss on the sources' `out`
            split; None = never.

    Raises:
        InputError: an unknown hyperparameter.
    """

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        # DomainBed draws from 10^U(-5, -3.5) around its default of 5e-5: around this default that is 10^U(-3.7, -2.2)
        "learning_rate": Hyperparameter(1e-3, "learning rate of Adam", log_uniform(-4, -2), tensor=True),
        "weight_decay": Hyperparameter(0.0, "L2 penalty inside Adam", log_uniform(-6, -2), tensor=True),
    }
    version: ClassVar[int] = 1
    batches: ClassVar[str] = "pooled"
    control: ClassVar[str | None] = None
    phase1: ClassVar[Mapping[str, str]] = {}
    routed: ClassVar[bool] = False
    record_names: ClassVar[tuple[str, ...]] = ()
    validate_every: ClassVar[float | None] = None

    def __init__(self, setup: Setup, **values: float | int | str):
        self.setup = setup
        known = self.known_hyperparameters()
        for name in values:
            if name not in known:
                raise InputError(f"{type(self).__name__} has no hyperparameter '{name}'; it has {', '.join(known)}.")
        self.values = {name: values.get(name, h.default) for name, h in known.items()}
        for name, value in self.values.items():
            setattr(self, name, value)

    @classmethod
    def known_hyperparameters(cls) -> dict[str, Hyperparameter]:
        """Hyperparameters of this class and its base classes; a class may redefine one of its base class."""
        found = {}
        for base in reversed(cls.__mro__):
            found |= vars(base).get("hyperparameters", {})
        return found

    @classmethod
    def given(cls) -> tuple[str, ...]:
        """Entries of the state that are known before training and not made by `initial_state`."""
        return (*(() if cls.control is None else ("mask",)), *cls.phase1)

    @classmethod
    def tensors(cls) -> tuple[str, ...]:
        """Hyperparameters in which networks of one stack may differ: those with ``tensor=True``.

        There are none if the class has an `__init__` of its own, which may compute other attributes from them.
        """
        if cls.__init__ is not Algorithm.__init__:
            return ()
        return tuple(name for name, h in cls.known_hyperparameters().items() if h.tensor)

    def with_values(self, values: Mapping[str, Tensor]) -> "Algorithm":
        """The method with other values of some hyperparameters, as the engine calls it under `vmap`."""
        return type(self)(self.setup, **{**self.values, **values})

    @classmethod
    def from_settings(cls, settings: Settings) -> dict[str, float]:
        """Hyperparameters that the settings of an experiment determine; in trial 0 they replace the defaults."""
        own = cls.known_hyperparameters()["learning_rate"] is not Algorithm.hyperparameters["learning_rate"]
        return {} if own else {"learning_rate": settings.ph2_lr_important}

    @classmethod
    def refusal(cls, network: PureNetwork) -> str | None:
        """What keeps the method from training such a network, as the beginning of a sentence; None = it can."""
        return None

    # Called for one network at a time, once or in each step, outside of vmap.

    def extra_parameters(self, draw: torch.Generator) -> Params:
        """Parameters trained beside the classifier's: float32, CPU; `draw` is the `noise` stream of the seed."""
        return {}

    def draw(self, draw: torch.Generator, rows: int) -> Noise:
        """Random numbers of a step: float32 or int64, CPU; shapes depend on nothing but the batch's `rows`."""
        return {}

    def initial_state(self, params: Params) -> State:
        """State before the first step; extend the dictionary of `super()`.

        What follows from hyperparameters by Python's arithmetic, such as the number of a step, belongs here.
        """
        return {"step": torch.zeros((), dtype=torch.long), "adam": adam_state(params)}

    # Pure functions of one network, run under vmap.

    def begin(self, params: Params, state: State) -> Params:
        """Parameters before the first step, given the start."""
        return params

    def loss(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Tensor, State]:
        """What is minimized: the loss (scalar), and the entries of the state that change (``{}`` if none)."""
        return F.cross_entropy(self.forward(params, batch.features), batch.labels), {}

    def gradients(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Params, Tensor, State]:
        """Direction of the step: gradient by parameter name, the loss, and the entries of the state that change.

        Raises:
            InputError: `loss` does not return a pair.
        """

        def checked(p: Params) -> tuple[Tensor, State]:
            found = self.loss(p, batch, state, noise)
            if not isinstance(found, tuple):
                name = type(self).__name__
                raise InputError(f"{name}.loss must return the loss and changes of the state: loss, {{}}.")
            return found

        gradient, (loss, changes) = grad_and_value(checked, has_aux=True)(params)
        return gradient, loss, changes

    def rate(self, state: State) -> float | Tensor:
        """Learning rate of this step."""
        return self.learning_rate

    def update(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Params, State, Tensor]:
        """One step: new parameters, the whole new state, and the loss before the step."""
        gradient, loss, changes = self.gradients(params, batch, state, noise)
        state = {**state, **changes}
        new, moments = self.adam_step(params, gradient, state["adam"], self.rate(state))
        return new, {**state, "adam": moments, "step": state["step"] + 1}, loss

    def validated(self, params: Params, state: State, loss: Tensor) -> State:
        """Entries of the state that change after a validation; `loss`: `forward`'s mean on the sources' `out` split."""
        return {}

    def logits(self, params: Params, state: State, features: Tensor) -> Tensor:
        """Prediction: ``[N, D]`` -> ``[N, classes]``. A row's logits must not depend on the other rows."""
        return self.forward(params, features)

    def routing(self, params: Params, features: Tensor) -> Tensor:
        """Share of each image that goes to each expert: ``[N, D]`` -> ``[N, experts]``; needed if `routed`."""
        raise NotImplementedError

    # Parts to build with. Inputs are features ``[*, D]``, or with trained blocks tokens ``[*, T, D]``.

    def representation(self, params: Params, features: Tensor) -> Tensor:
        """Activations of the last hidden layer, or where there is none the features: inputs -> ``[*, h]``."""
        return self.setup.network.hidden(params, self.setup.network.features(params, features))

    def head(self, params: Params, representation: Tensor) -> Tensor:
        """The last layer: ``[*, h]`` -> ``[*, classes]``."""
        return self.setup.network.head(params, representation)

    def forward(self, params: Params, features: Tensor) -> Tensor:
        """The network: inputs -> logits ``[*, classes]``."""
        return self.head(params, self.representation(params, features))

    def adam_step(
        self,
        params: Params,
        gradient: Params,
        moments: State,
        rate: float | Tensor | None = None,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    ) -> tuple[Params, State]:
        """One step of Adam with the method's `weight_decay`, and trained blocks at their own fraction of the rate.

        Args:
            rate: default `learning_rate`.
            moments, betas: see `parts.adam`.
        """
        rate, fraction = self.learning_rate if rate is None else rate, self.setup.backbone_rate
        if fraction != 1:
            like = next(iter(params.values()))
            sizes = tuple((value.numel(), self.of_backbone(name)) for name, value in params.items())
            rate = rate * _rate_shares(sizes, fraction, like.dtype, like.device)
        return adam(params, gradient, moments, rate, self.weight_decay, betas)

    def of_backbone(self, name: str) -> bool:
        """Whether a parameter is one of the trained blocks, which learn at a rate of their own."""
        return name in self.setup.network.block_names

    def by_domain(self, values: Tensor) -> Tensor:
        """Rows of a balanced batch ``[B, …]`` -> ``[domains, batch_size, …]``."""
        return values.unflatten(0, (self.setup.domains, -1))

    def domain_losses(self, params: Params, batch: Batch) -> Tensor:
        """Mean cross-entropy of each source domain in a balanced batch: ``[domains]``."""
        losses = F.cross_entropy(self.forward(params, batch.features), batch.labels, reduction="none")
        return self.by_domain(losses).mean(1)

    def gradient_on(self, params: Params, features: Tensor, labels: Tensor) -> tuple[Params, Tensor]:
        """Gradient, by name, of the mean cross-entropy on some rows; and that loss."""
        return grad_and_value(lambda p: F.cross_entropy(self.forward(p, features), labels))(params)

    def domain_gradients(self, params: Params, batch: Batch) -> tuple[Params, Tensor]:
        """Gradients of the domains' losses in a balanced batch: name -> ``[domains, *shape]``; and the losses."""
        each = vmap(self.gradient_on, in_dims=(None, 0, 0))
        return each(params, self.by_domain(batch.features), self.by_domain(batch.labels))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter of the network, by name, without those of `extra_parameters`."""
        return self.setup.network.shapes

    def parts(self, params: Params) -> tuple[Params, Params]:
        """The network's parameters, and those of `extra_parameters`."""
        network = {name: params[name] for name in self.shapes}
        return network, {name: value for name, value in params.items() if name not in network}


@lru_cache(maxsize=4)
def _rate_shares(
    sizes: tuple[tuple[int, bool], ...], fraction: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Learning rate of each number of a network, relative to the classifier's: ``[P]``.

    Args:
        sizes: of each parameter in order, how many numbers it has, and whether it is of the trained blocks.
    """
    return torch.cat([torch.full((n,), fraction if own else 1.0, dtype=dtype, device=device) for n, own in sizes])


ALGORITHMS: dict[str, type[Algorithm]] = {}


def register(algorithm: type[Algorithm]) -> type[Algorithm]:
    """Make a class known by its name; a decorator.

    Raises:
        InputError: a class of another module has that name.
    """
    there = ALGORITHMS.get(algorithm.__name__)
    if there and there.__module__ != algorithm.__module__:  # same module: its notebook cell was run again
        raise InputError(f"The name '{algorithm.__name__}' is taken by a method in {there.__module__}.")
    ALGORITHMS[algorithm.__name__] = algorithm
    return algorithm


def find(name: str) -> type[Algorithm]:
    """The class with that name.

    Raises:
        InputError: there is none; the message lists the names.
    """
    if name == "Ensemble":
        raise InputError("Ensemble is not trained: every comparison with ERM reports the ensemble of its networks.")
    if name not in ALGORITHMS:
        known = ", ".join(sorted(ALGORITHMS))
        raise InputError(f"There is no method '{name}'; there are {known}, and yours as FILE.py:NAME.")
    return ALGORITHMS[name]


@register
class ERM(Algorithm):
    """Empirical risk minimization (Vapnik 1998): mean cross-entropy over all source images."""


@register
class ERMBalanced(Algorithm):
    """`ERM` on balanced batches: the baseline of every method that needs equally many rows of each domain."""

    batches = "balanced"
