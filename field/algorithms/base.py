"""What all methods share: hyperparameters, Adam, and the `Algorithm` that every method extends.

Everything a method does in a step is a pure function of one network: tensors in, tensors out, nothing kept on the
object. `engine.FunctionalEngine` runs it under `torch.func.vmap`, so that S seeds train at once. Therefore
- what a method remembers (moments of Adam, averages, whose turn it is) is in `state`, a nested dictionary of tensors;
- random numbers come in as `noise`, drawn outside (`Algorithm.draw`);
- a branch that depends on a tensor is a `torch.where`.

`Algorithm` documents shapes and types of what a method can override; the overrides do not repeat them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from config import InputError, Settings
from engine import Batch, Params

State = dict[str, Any]  # of one network: name -> tensor, or such a dictionary
Noise = dict[str, Tensor]  # random numbers of one network and one step


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter of a method.

    Attributes:
        default: value in trial 0.
        meaning: what it does, with its unit.
        search: NumPy generator -> a value, the distribution of random search; None = never searched.
    """

    default: float | int | str
    meaning: str
    search: Callable[[np.random.Generator], float | int | str] | None = None


def log_uniform(low: float, high: float) -> Callable[[np.random.Generator], float]:
    """``10 ** U(low, high)``."""
    return lambda rng: float(10 ** rng.uniform(low, high))


def uniform(low: float, high: float) -> Callable[[np.random.Generator], float]:
    """``U(low, high)``."""
    return lambda rng: float(rng.uniform(low, high))


def choice(*values: float | int | str) -> Callable[[np.random.Generator], float | int | str]:
    """One of `values`, all equally likely."""
    return lambda rng: values[int(rng.integers(len(values)))]


@dataclass(frozen=True)
class Setup:
    """What a method knows about the training it is used in.

    Attributes:
        features: D, the length of a feature vector.
        classes: number of classes.
        domains: number of source domains.
        hidden_sizes: widths of the classifier's hidden layers.
        batch_size: images per step (pooled), or per step and domain (balanced).
        steps_per_epoch: updates in an epoch.
        epochs: passes over the data (in balanced training: as many updates as pooled training would take).
    """

    features: int
    classes: int
    domains: int
    hidden_sizes: tuple[int, ...]
    batch_size: int
    steps_per_epoch: int
    epochs: int

    @property
    def steps(self) -> int:
        """Updates in the whole training."""
        return self.steps_per_epoch * self.epochs


class Algorithm:
    """A way to train the classifier. This class itself is empirical risk minimization (Vapnik 1998).

    To add a method, extend it and override what differs: usually `loss`; `gradients`, if the direction of the step is
    not the gradient of a loss; `update`, if the step is not Adam's; `logits`, if prediction differs.

    Args:
        setup: the training.
        values: hyperparameters by name; the others have their defaults.

    Attributes:
        hyperparameters: name -> `Hyperparameter`, declared by this class; those of its base classes are added. Their
            values are attributes of the object, by the same names.
        version: number of the method's code, written with its results. Raise it when you change what the method
            computes: results of different versions are not mixed. (Comments, docstrings and defaults need no new
            version; the values of the hyperparameters are compared by themselves.)
        batches: "pooled" (source domains mixed, as in Phase 2) or "balanced" (equally many rows of each domain).
        control: name in `study.CONTROLS` of how the method's mask is made; None = the method has no mask. The mask is
            in the state: "mask", name of the tracked matrix -> bool, True = marked.
        routed: whether the method has experts and a `routing`.
        record_names: entries of the state that are kept with the results.
        validate_every: fraction of an epoch after which `validated` is called with the loss on the sources' `out`
            split; None = never.

    Raises:
        InputError: an unknown hyperparameter.
    """

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "learning_rate": Hyperparameter(1e-3, "learning rate of Adam", log_uniform(-4, -2)),
        "weight_decay": Hyperparameter(0.0, "L2 penalty inside Adam", log_uniform(-6, -2)),
    }
    version: ClassVar[int] = 1
    batches: ClassVar[str] = "pooled"
    control: ClassVar[str | None] = None
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
    def from_settings(cls, settings: Settings) -> dict[str, float]:
        """Hyperparameters that the settings of an experiment determine; in trial 0 they replace the defaults."""
        own = cls.known_hyperparameters()["learning_rate"] is not Algorithm.hyperparameters["learning_rate"]
        return {} if own else {"learning_rate": settings.ph2_lr_important}

    # Drawn once or per step, outside of vmap.

    def extra_parameters(self, draw: torch.Generator) -> Params:
        """Parameters that are trained beside the classifier's (an adversary, masks, experts): float32, CPU.

        Args:
            draw: the `noise` stream of the seed.
        """
        return {}

    def draw(self, draw: torch.Generator, rows: int) -> Noise:
        """Random numbers of one step: float32 or int64, CPU; the same shapes in every step with the same `rows`.

        Args:
            draw: the `noise` stream of the seed.
            rows: B, images in the batch.
        """
        return {}

    # Pure functions of one network, run under vmap.

    def initial_state(self, params: Params) -> State:
        """State before the first step; extend the dictionary of `super()`."""
        return {"step": torch.zeros((), dtype=torch.long), "adam": adam_state(params)}

    def begin(self, params: Params, state: State) -> Params:
        """Parameters before the first step, given the start."""
        return params

    def loss(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Tensor, State]:
        """What is minimized.

        Returns:
            The loss (scalar), and the entries of the state that change (``{}`` if none).
        """
        return F.cross_entropy(self.forward(params, batch.features), batch.labels), {}

    def gradients(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Params, Tensor, State]:
        """Direction of the step.

        Returns:
            Gradient by parameter name, the loss (scalar), and the entries of the state that change.

        Raises:
            InputError: `loss` does not return a pair.
        """

        def loss_and_changes(p: Params) -> tuple[Tensor, State]:
            found = self.loss(p, batch, state, noise)
            if not isinstance(found, tuple):
                raise InputError(
                    f"{type(self).__name__}.loss must return the loss and changes of the state: loss, {{}}."
                )
            return found

        gradient, (loss, changes) = self.gradient_of(loss_and_changes, params)
        return gradient, loss, changes

    def update(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Params, State, Tensor]:
        """One step.

        Returns:
            New parameters, the whole new state, and the loss before the step.
        """
        gradient, loss, changes = self.gradients(params, batch, state, noise)
        state = {**state, **changes}
        new, moments = adam(params, gradient, state["adam"], self.learning_rate, self.weight_decay)
        return new, {**state, "adam": moments, "step": state["step"] + 1}, loss

    def validated(self, params: Params, state: State, loss: Tensor) -> State:
        """Entries of the state that change after a validation.

        Args:
            params: current parameters.
            state: current state.
            loss: mean cross-entropy of `forward` on the sources' `out` split, a scalar.
        """
        return {}

    def logits(self, params: Params, state: State, features: Tensor) -> Tensor:
        """Prediction: ``[N, D]`` -> ``[N, classes]``. A row's logits must not depend on the other rows."""
        return self.forward(params, features)

    def routing(self, params: Params, features: Tensor) -> Tensor:
        """Share of each image that goes to each expert: ``[N, D]`` -> ``[N, experts]``; needed if `routed`."""
        raise NotImplementedError

    # Parts to build with.

    def representation(self, params: Params, features: Tensor) -> Tensor:
        """Activations of the last hidden layer: ``[*, D]`` -> ``[*, h]``."""
        for i in range(len(self.setup.hidden_sizes)):
            features = torch.relu(F.linear(features, params[f"layers.{i}.weight"], params[f"layers.{i}.bias"]))
        return features

    def head(self, params: Params, representation: Tensor) -> Tensor:
        """The last layer: ``[*, h]`` -> ``[*, classes]``."""
        last = len(self.setup.hidden_sizes)
        return F.linear(representation, params[f"layers.{last}.weight"], params[f"layers.{last}.bias"])

    def forward(self, params: Params, features: Tensor) -> Tensor:
        """The classifier: ``[*, D]`` -> logits ``[*, classes]``."""
        return self.head(params, self.representation(params, features))

    def by_domain(self, values: Tensor) -> Tensor:
        """Rows of a balanced batch ``[B, …]`` -> ``[domains, batch_size, …]``."""
        return values.unflatten(0, (self.setup.domains, -1))

    def domain_losses(self, params: Params, batch: Batch) -> Tensor:
        """Mean cross-entropy of each source domain in a balanced batch: ``[domains]``."""
        losses = F.cross_entropy(self.forward(params, batch.features), batch.labels, reduction="none")
        return self.by_domain(losses).mean(1)

    def domain_gradients(self, params: Params, batch: Batch) -> tuple[Params, Tensor]:
        """Gradients of the domains' losses in a balanced batch: name -> ``[domains, *shape]``; and the losses."""

        def loss(p: Params, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            value = F.cross_entropy(self.forward(p, features), labels)
            return value, value

        each = torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(None, 0, 0))
        return each(params, self.by_domain(batch.features), self.by_domain(batch.labels))

    @staticmethod
    def gradient_of(loss: Callable[[Params], tuple[Tensor, State]], params: Params) -> tuple[Params, tuple]:
        """Gradient, by name, of a function ``params -> (loss, anything)``; and what the function returned."""

        def both(p: Params) -> tuple[Tensor, tuple]:
            value, rest = loss(p)
            return value, (value, rest)

        return torch.func.grad(both, has_aux=True)(params)

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the classifier's parameters, without those of `extra_parameters`."""
        depth = len(self.setup.hidden_sizes) + 1
        return tuple(f"layers.{i}.{kind}" for i in range(depth) for kind in ("weight", "bias"))

    def parts(self, params: Params) -> tuple[Params, Params]:
        """The classifier's parameters, and those of `extra_parameters`."""
        classifier = {name: params[name] for name in self.classifier_names}
        return classifier, {name: value for name, value in params.items() if name not in classifier}


def linear_start(shape: tuple[int, ...], inputs: int, draw: torch.Generator) -> Tensor:
    """Initial weights or biases of PyTorch's linear layers: uniform within 1/sqrt(inputs) of 0."""
    return (2 * torch.rand(shape, generator=draw) - 1) / inputs**0.5


def flatten(params: Params) -> Tensor:
    """All numbers of a dictionary of tensors in one vector, in the order of the dictionary."""
    return torch.cat([value.flatten() for value in params.values()])


def unflatten(flat: Tensor, like: Params) -> Params:
    """Inverse of `flatten`."""
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def adam_state(params: Params) -> State:
    """Moments of Adam before the first step."""
    zeros = torch.zeros_like(flatten(params))
    return {"mean": zeros, "square": zeros.clone(), "count": zeros.new_zeros(())}


def adam(
    params: Params,
    gradient: Params,
    state: State,
    learning_rate: float | Tensor,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[Params, State]:
    """One step of Adam (Kingma & Ba 2015) as a pure function, equal to `torch.optim.Adam`'s.

    Args:
        params: parameters.
        gradient: by name, for at least the names of `params`.
        state: of `adam_state` or the last step.
        learning_rate: a number, or a scalar tensor.
        weight_decay: L2, added to the gradient.
        betas: decay of the two moments.

    Returns:
        New parameters and new state.
    """
    old = flatten(params)
    g = flatten({name: gradient[name] for name in params})
    if weight_decay:
        g = g + weight_decay * old
    count = state["count"] + 1
    mean = betas[0] * state["mean"] + (1 - betas[0]) * g
    square = betas[1] * state["square"] + (1 - betas[1]) * g * g
    denominator = (square / (1 - betas[1] ** count)).sqrt() + 1e-8
    new = old - learning_rate * (mean / (1 - betas[0] ** count)) / denominator
    return unflatten(new, params), {"mean": mean, "square": square, "count": count}


def restart_where(condition: Tensor, state: State) -> State:
    """Moments of Adam, reset to zero where `condition` (bool, scalar) holds, as in a new optimizer."""
    return {name: torch.where(condition, torch.zeros_like(value), value) for name, value in state.items()}
