"""Small problems to train on, and the plain loop that everything else is compared with."""

from types import SimpleNamespace

import torch
from torch import nn

from config import Settings
from models import FeedforwardClassifier
from training import Problem


def features(domains=("art", "photo", "sketch"), classes=("cat", "dog", "owl"), per_cell=20, size=8, seed=0):
    """A stand-in for a FeatureSet: classes are Gaussian blobs, shifted a little from domain to domain."""
    generator = torch.Generator().manual_seed(seed)
    d, c = (t.flatten() for t in torch.meshgrid(torch.arange(len(domains)), torch.arange(len(classes)), indexing="ij"))
    domain, label = d.repeat_interleave(per_cell), c.repeat_interleave(per_cell)
    centres = 2 * torch.randn(len(classes), size, generator=generator)
    shifts = 0.5 * torch.randn(len(domains), size, generator=generator)
    x = centres[label] + shifts[domain] + torch.randn(len(label), size, generator=generator)
    files = tuple(f"{domains[i]}/{classes[j]}/{k:04d}.png" for k, (i, j) in enumerate(zip(domain, label, strict=True)))
    return SimpleNamespace(
        features=x, labels=label, domains=domain, files=files, class_names=tuple(classes), domain_names=tuple(domains)
    )


def problem(dtype=torch.float64, settings=None, **kinds):
    """`features` as a `Problem`."""
    return Problem.from_features(features(**kinds), settings or Settings.current(), dtype=dtype)


def plain_loop(problem, start, epochs_of_rows, settings, learning_rate, scale=None):
    """An ordinary PyTorch training loop for one network, with nothing of the project but its module.

    Args:
        problem: data.
        start: parameter name -> tensor.
        epochs_of_rows: list of row orders, one per epoch.
        settings: hidden sizes and batch size.
        learning_rate: of Adam.
        scale: (epoch, name) -> factor on the step of each weight of that parameter, or None.
    """
    network = FeedforwardClassifier(problem.features.shape[1], len(problem.class_names), settings.hidden_sizes)
    network = network.to(problem.features.dtype)
    network.load_state_dict({name: value.to(problem.features.dtype) for name, value in start.items()})
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    losses, accuracies = [], []
    for epoch, rows in enumerate(epochs_of_rows):
        total, right = 0.0, 0
        for batch in rows.split(settings.batch_size):
            logits = network(problem.features[batch])
            loss = nn.functional.cross_entropy(logits, problem.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            before = {name: p.detach().clone() for name, p in network.named_parameters()}
            optimizer.step()
            with torch.no_grad():
                for name, p in network.named_parameters():
                    factor = None if scale is None else scale(epoch, name)
                    if factor is not None:
                        p.copy_(before[name] + factor * (p - before[name]))
            total += loss.item() * len(batch)
            right += (logits.argmax(1) == problem.labels[batch]).sum().item()
        losses.append(total / len(rows))
        accuracies.append(right / len(rows))
    return dict(network.state_dict()), losses, accuracies
