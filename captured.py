"""A training step as one CUDA graph: on a GPU, launching some forty small kernels takes longer than running them."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models import FeedforwardClassifier
from stacks import MatmulEngine, Params, Rates

log = logging.getLogger(__name__)

Step = Callable[[], tuple[Tensor, Tensor]]


def cuda_graph(step: Step) -> Step:
    """Record `step` without running it; what is returned runs it, on the same memory each time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return results

    return replay


class CapturedEngine(MatmulEngine):
    """`MatmulEngine` whose steps on batches of the usual length are recorded once and replayed.

    The first replay is checked against the same step taken in the usual way; where recording fails or differs, one line
    says so and the usual way is taken. Loss and right answers that `step` returns are valid until the next step.

    Args:
        template, params, learning_rate: as in `MatmulEngine`.
        batch_size: the usual length of a batch.
        capture: see `cuda_graph`.
    """

    def __init__(
        self,
        template: FeedforwardClassifier,
        params: Params,
        learning_rate: float,
        batch_size: int = 32,
        capture: Callable[[Step], Step] = cuda_graph,
    ):
        super().__init__(template, params, learning_rate)
        self.batch_size, self.capture, self.available = batch_size, capture, True
        self.replay: Step | None = None
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.stretch: tuple[int, int] | None = None  # of the weights with a rate, when the step was recorded

    @torch.no_grad()
    def step(
        self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._obey(rates)
        if self.adam.stretch != self.stretch:  # the rates lie in other memory now
            self.replay, self.stretch = None, self.adam.stretch
        if not self.available or features.shape[1] != self.batch_size:
            return self._step(features, targets)
        if self.inputs is None:
            self.inputs = features.clone(), targets.clone()
        for mine, new in zip(self.inputs, (features, targets), strict=True):
            mine.copy_(new)
        if self.replay is None:
            return self._first_step()
        return self.replay()

    def _first_step(self) -> tuple[Tensor, Tensor]:
        """Take a step in the usual way, record it, and go on with the record if it does the same."""
        state = (self.adam.flat, *self.adam.moments, self.adam.count)
        before = [value.clone() for value in state]
        expected = self._step(*self.inputs)
        after = [value.clone() for value in state]
        try:
            self.replay = self.capture(lambda: self._step(*self.inputs))
            for value, old in zip(state, before, strict=True):
                value.copy_(old)
            found = self.replay()
            pairs = zip((*state, *found), (*after, *expected), strict=True)
            if all(torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in pairs):
                return found
            reason = "a recorded step differs from the step"
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
        log.warning("CUDA graphs are not used (%s): training takes longer.", reason)
        self.available, self.replay = False, None
        for value, new in zip(state, after, strict=True):
            value.copy_(new)
        return expected


def usable(
    batch_size: int,
    sizes: tuple[int, int, Sequence[int]],
    device: str = "cuda",
    capture: Callable[[Step], Step] = cuda_graph,
) -> bool:
    """Whether steps can be recorded here, tried on two networks; if not, one line says so.

    Args:
        batch_size: the usual length of a batch.
        sizes: (in_features, num_classes, hidden_sizes).
        device: of the networks.
        capture: see `cuda_graph`.
    """
    template = FeedforwardClassifier.outline(*sizes)
    params = {name: torch.zeros(2, 1, *v.shape, device=device) for name, v in template.named_parameters()}
    engine = CapturedEngine(template, params, 1e-3, batch_size, capture)
    rows = torch.zeros(2, batch_size, sizes[0], device=device)
    engine.step(rows, torch.zeros(2, batch_size, dtype=torch.long, device=device), {})
    return engine.available
