"""What each layer of a network holds: clusters of the classes, a linear probe, effective rank, similarity.

*Layer* c is what the first c convolutions give with their activations and poolings, flattened: what the next layer
sees, and what a cut at c hands on. Layer 0 is the input. The *averaged maps* of layer c are what its convolution gives
before activation and pooling, averaged over the places of the image: a number per channel, which the original clusters
(tusharmanekar/mp-tl-study).
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
import torch
from scipy.special import entr
from torch import Tensor
from tqdm.auto import tqdm

from config import InputError
from engine import generator
from storage import atomic_write
from transfer.convnet import ConvClassifier
from transfer.images import Examples

FILE = "layer_probes.csv"  # in a results directory
PER_CLASS = 100  # test images of each class, and as many training images that the linear probe is fitted to
STRENGTH = 100.0  # of the linear probe: C times the number of features, which are standardized
TOLERANCE, STEPS = 1e-6, 1000  # of its fit: largest component of the gradient at the end, and Newton steps
STARTS = 10  # of k-means
PIXELS, UNTRAINED, PRETRAINED, FINETUNED = "pixels", "untrained", "pretrained", "finetuned"
COLUMNS = {"task": str, "network": str, "repeat": int, "layer": int, "measure": str, "value": float, "n": int}
KEY = "key"  # a further column of the file: the networks and images that a row comes from
CLUSTERINGS = {  # what is clustered, and how: names of its adjusted Rand index and its matched accuracy
    ("features", "kmeans"): ("ari_kmeans", "accuracy_matched"),
    ("features", "agglomerative"): ("ari_agglomerative", "accuracy_agglomerative"),
    ("maps", "kmeans"): ("ari_original_kmeans", "accuracy_original_kmeans"),
    ("maps", "agglomerative"): ("ari_original", "accuracy_original"),
}

Networks = Sequence[ConvClassifier]
Value = tuple[str, float, int]  # measure, its value, and the number of images behind it


class Images(NamedTuple):
    """What the networks of a repeat are measured on: float32 ``[n, C, H, W]`` and int64 ``[n]`` each."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Layer(NamedTuple):
    """What a layer gives for n images."""

    features: np.ndarray  # float32 [n, D], flattened; what the next layer sees
    maps: np.ndarray | None  # float32 [n, channels], averaged before activation and pooling; None of the input


# Measures: arrays in, a number out


def adjusted_rand_index(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Adjusted Rand index (Hubert & Arabie, 1985): 1 for the classes themselves, 0 on average for random clusters.

    It counts pairs of different images. Both are int ``[n]``.
    """
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(labels, clusters))


def matched_accuracy(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that lie in the cluster that is matched with their class.

    Clusters and classes are matched one to one so that the share is largest (Kuhn, 1955). Both are int ``[n]``, numbers
    from 0.
    """
    counts = np.zeros((clusters.max() + 1, labels.max() + 1), dtype=int)
    np.add.at(counts, (clusters, labels), 1)
    matched = scipy.optimize.linear_sum_assignment(counts, maximize=True)
    return float(counts[matched].sum() / len(labels))


def kmeans(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Clusters, int ``[n]``, of features ``[n, D]``: the best of `STARTS` k-means (Lloyd's, k-means++ starts)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer points that differ than clusters: a dead layer
        return KMeans(clusters, n_init=STARTS, random_state=seed).fit_predict(features)


def agglomerative(features: np.ndarray, clusters: int) -> np.ndarray:
    """Clusters, int ``[n]``, by average linkage of cosine distances; features ``[n, D]`` without rows of zeros."""
    from sklearn.cluster import AgglomerativeClustering

    directions = features.astype(np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    distances = (1 - directions @ directions.T).clip(min=0)  # as a product: 10 times as fast as pair by pair
    return AgglomerativeClustering(clusters, metric="precomputed", linkage="average").fit_predict(distances)


def linear_probe(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on test images of logistic regression fitted to training images (Alain & Bengio, 2017).

    The penalty 1/(2C) has C = `STRENGTH` over the mean squared norm of the training images, which makes it the same for
    layers of any width.

    Args:
        train, test: ``[n, D]``, see `standardized`.
        train_labels, test_labels: int ``[n]``.

    Raises:
        RuntimeError: it did not converge.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    strength = STRENGTH / ((train**2).sum(1).mean() or 1)
    model = LogisticRegression(C=strength, solver="newton-cg", tol=TOLERANCE, max_iter=STEPS)
    with threadpool_limits(1):  # as `engine.logistic_regression`, whose solver takes up to ten times as long on these
        model.fit(train, train_labels)
    if model.n_iter_.max() >= STEPS:
        raise RuntimeError(f"The linear probe of {len(train)} images did not converge in {STEPS} steps.")
    return float(model.score(test, test_labels))


def standardized(features: np.ndarray, rows: int | None = None) -> np.ndarray:
    """Features ``[n, D]`` with mean 0 and deviation 1 on the first rows (default: all); those constant there become 0.

    In float64. With more features than images the result is ``[n, n]``: coordinates in the space that the images span,
    with the same distances and inner products, on which alone `kmeans` and `linear_probe` depend.
    """
    first, scaled = features[:rows].astype(np.float64), features.astype(np.float64)
    varies = np.ptp(first, axis=0) > 0  # a constant one may have a deviation of a rounding error
    scaled = np.where(varies, scaled - first.mean(0), 0) / np.where(varies, first.std(0), 1)
    if scaled.shape[1] <= len(scaled):
        return scaled
    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    return vectors * np.sqrt(values.clip(min=0))


def effective_rank(values: np.ndarray) -> float:
    """Effective rank from singular values: exp of the entropy of their shares (Roy & Vetterli, EUSIPCO 2007).

    k equal values have k, whatever zeros are beside them; values that are all zero have 0.

    Args:
        values: ``[k]``, none below 0: singular values of a matrix, or eigenvalues of a covariance.
    """
    total = values.sum()
    return float(np.exp(entr(values / total).sum())) if total > 0 else 0.0


def weight_rank(weight: Tensor) -> float:
    """`effective_rank` of a convolution ``[out, in, k, k]`` as the matrix ``[out, in·k·k]`` that it applies."""
    return effective_rank(torch.linalg.svdvals(weight.detach().double().cpu().flatten(1)).numpy())


def centered_gram(features: np.ndarray) -> np.ndarray:
    """Inner products of centered features: ``[n, D]`` -> float64 ``[n, n]``.

    Its eigenvalues are those of the covariance times n − 1, and zeros.
    """
    centered = features.astype(np.float64)
    centered -= centered.mean(0)
    centered[:, np.ptp(features, axis=0) == 0] = 0  # where the mean may be off by a rounding error
    return centered @ centered.T


def feature_rank(gram: np.ndarray) -> float:
    """`effective_rank` of the covariance of features, from their `centered_gram`; at most n − 1."""
    return effective_rank(np.linalg.eigvalsh(gram).clip(min=0))


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Similarity of two representations of the same images: linear CKA (Kornblith et al., ICML 2019).

    1 if one is the other rotated and scaled. It is biased upwards where there are more features than images: compare it
    with that of an untrained network.

    Args:
        first, second: `centered_gram` of each, ``[n, n]``.

    Returns:
        In [0, 1]; NaN if one of them is the same for all images.
    """
    scale = np.linalg.norm(first) * np.linalg.norm(second)
    return float((first * second).sum() / scale) if scale > 0 else float("nan")


# Layers of a network


@torch.no_grad()
def layers_of(network: ConvClassifier, images: Tensor) -> Iterator[Layer]:
    """The input and each layer of a network, for images ``[n, C, H, W]``."""
    seen = images.to(network.head.weight)
    yield Layer(seen.flatten(1).cpu().numpy(), None)
    for layer, convolution in enumerate(network.convs):
        maps = convolution(seen).mean((2, 3)).cpu().numpy()
        seen = network.block(seen, layer)
        yield Layer(seen.flatten(1).cpu().numpy(), maps)


def balanced_rows(labels: Tensor, most: int, draw: torch.Generator) -> Tensor:
    """Random rows of every class, `most` or as many as the smallest class has: int64, in the order of the classes."""
    classes = [(labels == one).nonzero().flatten() for one in labels.unique()]
    size = min(most, *map(len, classes))
    return torch.cat([rows[torch.randperm(len(rows), generator=draw)[:size]] for rows in classes])


def probe_layers(
    networks: Networks,
    untrained: Networks,
    examples: Examples,
    classes: Sequence[str],
    *,
    finetuned: Networks = (),
    repeats: Sequence[int] | None = None,
    task: str = "",
    path: str | Path | None = None,
    per_class: int = PER_CLASS,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure every layer of the networks of each repeat, on the same images for all of them.

    Repeat r draws its images by itself: `per_class` test images of each class, and as many training images for the
    linear probe; where the smallest class has fewer, that many of each. (ARI depends on the number of images.) There
    are as many clusters as classes. Measures are

    - ari_kmeans: `adjusted_rand_index` of `kmeans` on `standardized` features;
    - ari_agglomerative: that of `agglomerative`, without images whose features are all zero, which have no direction;
    - ari_original: the same on the averaged maps, as in the original;
    - ari_original_kmeans: that of `kmeans` on the standardized averaged maps;
    - accuracy_matched: `matched_accuracy` of `kmeans`; and accuracy_agglomerative, accuracy_original,
      accuracy_original_kmeans, that of the other three;
    - linear_probe: see there;
    - rank_weights: `weight_rank` of the layer; rank_features: `feature_rank` of what it gives;
    - cka: `linear_cka` with the same layer of the pretrained network.

    Raw pixels are layer 0 of the network "pixels", which has no maps and no weights; "cka" is that of the untrained and
    of the fine-tuned networks.

    Args:
        networks: the pretrained ones, one per repeat.
        untrained: where each of them began; none, or one per repeat, as for `finetuned`.
        examples: images of the classes to tell apart, usually those of the fine-tuning task.
        classes: their names.
        finetuned: what became of the pretrained networks.
        repeats: number of each repeat, by which its images are drawn; default 0, 1, ….
        task: its name.
        path: CSV in which rows are kept, of several tasks. A repeat that it has is not measured again, unless its
            networks or images are others now.
        per_class: see above.
        progress: show a bar.

    Returns:
        A row per network, layer and measure: task, network ("pixels", "untrained", "pretrained", "finetuned"), repeat,
        layer, measure, value (accuracies are fractions; NaN where it is not defined) and n (images behind it, 0 of
        "rank_weights").

    Raises:
        InputError: a class without images, a network that is not finite, or a damaged file.
        RuntimeError: a linear probe did not converge.
    """
    repeats = [*range(len(networks))] if repeats is None else [*repeats]
    kinds = {PRETRAINED: networks, UNTRAINED: untrained, FINETUNED: finetuned}
    kinds = {kind: some for kind, some in kinds.items() if len(some)}
    units = [dict(zip(kinds, each, strict=True)) for each in zip(*kinds.values(), strict=True)]
    kept, quiet = _kept(path), {} if progress else {"disable": True}
    with tqdm(total=len(units) * (len(kinds) + 1), desc="Layer probes", unit="network", **quiet) as bar:
        for repeat, unit in zip(repeats, units, strict=True):
            images = _images(examples, classes, per_class, repeat)
            key, there = _key(unit, images), (kept["task"] == task) & (kept["repeat"] == repeat)
            if (kept.loc[there, KEY] == key).any():
                bar.update(len(unit) + 1)
                continue
            rows = _measure(unit, images, repeat, bar.update)
            rows = pd.DataFrame(rows, columns=["network", "layer", "measure", "value", "n"])
            rows = rows.assign(task=task, repeat=repeat, key=key)[[*COLUMNS, KEY]]
            kept = pd.concat([kept[~there], rows]).sort_values(["task", "repeat"], kind="stable", ignore_index=True)
            if path is not None:
                with atomic_write(path) as temporary:
                    kept.to_csv(temporary, index=False)
    found = kept[(kept["task"] == task) & kept["repeat"].isin(repeats)]
    return found[[*COLUMNS]].reset_index(drop=True)


def read_probes(directory: str | Path) -> pd.DataFrame | None:
    """What `probe_layers` has kept in a results directory (`FILE`), of all tasks; None where there is nothing.

    Raises:
        InputError: the file is damaged.
    """
    path = Path(directory) / FILE
    return _kept(path)[[*COLUMNS]] if path.is_file() else None


def _kept(path: str | Path | None) -> pd.DataFrame:
    """The rows that were kept, with their keys."""
    types = COLUMNS | {KEY: str}
    if path is None or not Path(path).is_file():
        return pd.DataFrame(columns=[*types]).astype(types)
    try:
        table = pd.read_csv(path, dtype=types | {"value": str}, keep_default_na=False)[[*types]]
        return table.assign(value=[float(text or "nan") for text in table["value"]])  # to the last bit
    except (ValueError, KeyError):
        raise InputError(f"'{path}' is damaged: delete it, and the layers are measured again.") from None


def _images(examples: Examples, classes: Sequence[str], per_class: int, repeat: int) -> Images:
    """The images of a repeat."""
    parts = {"training": (examples.inputs, examples.labels), "test": (examples.test_inputs, examples.test_labels)}
    chosen = []
    for part, (inputs, labels) in parts.items():
        counts = torch.bincount(labels.cpu(), minlength=len(classes))
        if not counts.all():
            raise InputError(f"Class '{classes[int(counts.argmin())]}' has no {part} images to probe layers with.")
        rows = balanced_rows(labels.cpu(), per_class, generator(repeat, "probe", part))
        chosen += [inputs.cpu()[rows], labels.cpu()[rows]]
    return Images(*chosen)


def _key(networks: Mapping[str, ConvClassifier], images: Images) -> str:
    """16 hex digits of all that the rows of a repeat depend on."""
    values = {f"{kind}.{name}": value for kind, each in networks.items() for name, value in each.state_dict().items()}
    digest = hashlib.sha256(f"{STRENGTH} {TOLERANCE} {STARTS}".encode())
    for name, value in (values | images._asdict()).items():
        digest.update(f"{name} {tuple(value.shape)} ".encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _measure(
    networks: Mapping[str, ConvClassifier], images: Images, repeat: int, tick: Callable[[], object]
) -> Iterator[tuple[str, int, str, float, int]]:
    """Network, layer, measure, value and n of everything that is measured in a repeat; the pretrained comes first."""
    both, size, grams = torch.cat([images.train, images.test]), len(images.test), []
    labels = images.train_labels.numpy(), images.test_labels.numpy()
    for kind, network in networks.items():
        if not all(value.isfinite().all() for value in network.state_dict().values()):
            raise InputError(f"The {kind} network of repeat {repeat} has weights that are not finite.")
        for number, layer in enumerate(layers_of(network, both)):
            if number == 0 and kind != PRETRAINED:
                continue
            gram = centered_gram(layer.features[-size:])
            if kind == PRETRAINED:
                grams.append(gram)
            values = [*_of_layer(layer, *labels, repeat), ("rank_features", feature_rank(gram), size)]
            if number:
                values.append(("rank_weights", weight_rank(network.convs[number - 1].weight), 0))
            if kind != PRETRAINED:
                values.append(("cka", linear_cka(gram, grams[number]), size))
            yield from ((kind if number else PIXELS, number, *value) for value in values)
            if number == 0:
                tick()
        tick()


def _of_layer(layer: Layer, train_labels: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[Value]:
    """Clusterings and linear probe of a layer, whose first images are the training images."""
    rows = len(train_labels)
    yield from _clusterings("features", layer.features[rows:], labels, seed)
    if layer.maps is not None:
        yield from _clusterings("maps", layer.maps[rows:], labels, seed)
    train, test = np.split(standardized(layer.features, rows), [rows])
    yield "linear_probe", linear_probe(train, train_labels, test, labels), len(labels)


def _clusterings(kind: str, values: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[Value]:
    """What `CLUSTERINGS` has for features or maps: k-means of the standardized values, the other of the values."""
    clusters = kmeans(standardized(values), len(np.unique(labels)), seed)
    yield from _compared(CLUSTERINGS[kind, "kmeans"], clusters, labels)
    pointing = values.any(1)  # a row of zeros has no direction
    labels = labels[pointing]
    left = len(np.unique(labels))
    clusters = agglomerative(values[pointing], left) if left > 1 else None
    yield from _compared(CLUSTERINGS[kind, "agglomerative"], clusters, labels)


def _compared(names: tuple[str, str], clusters: np.ndarray | None, labels: np.ndarray) -> Iterator[Value]:
    """Adjusted Rand index and matched accuracy, NaN where there are no clusters."""
    for name, measure in zip(names, (adjusted_rand_index, matched_accuracy), strict=True):
        yield name, float("nan") if clusters is None else measure(clusters, labels), len(labels)
