"""How well the classes of the new task cluster in each layer, in the files of tusharmanekar/mp-tl-study.

A file ``SET/results/CLASSES_cluster.json`` is a list with an entry for each amount of data, repeat and convolution.
Clustered are the averaged maps (see `probes`) that the repeat's pretrained network gives for the images of its subset:
by average linkage of cosine distances, without images whose maps are all 0, into as many clusters as there are classes
among them.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from config import InputError
from engine import Params
from storage import Results, atomic_write
from transfer.arms import layers_of
from transfer.convnet import ConvClassifier
from transfer.images import Task, load_task
from transfer.networks import ConvNetworks
from transfer.original_files import FOLDERS
from transfer.probes import adjusted_rand_index, agglomerative, matched_accuracy
from transfer.study import file_of, filled, fingerprint, stored_networks, subset

log = logging.getLogger(__name__)

MOST_IMAGES = 6000  # of a subset: the memory for the distances grows with its square
IMAGES_AT_A_TIME = 500  # that a network is run on


def pair_scores(clusters: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Precision and recall over all pairs of images: together in a cluster against of the same class.

    NaN where no two images are together, or of the same class. Both are int ``[n]``.
    """
    from sklearn.metrics import pair_confusion_matrix

    (_, together), (same, both) = pair_confusion_matrix(labels, clusters)
    precision, recall = (float(both / of) if of else float("nan") for of in (both + together, both + same))
    return precision, recall


def export_clusters(
    directory: str | Path, results: Results, data: str | Path | None = None, progress: bool = True
) -> list[Path]:
    """Cluster what the pretrained networks of a transfer study give, and write it as the original does.

    Amounts of more than `MOST_IMAGES` images are left out.

    Args:
        directory: made if need be; gets ``SET/results/CLASSES_cluster.json``.
        results: of the transfer study, with its pretrained networks.
        data: where its images are, see `images.load_task`.
        progress: show a bar.

    Returns:
        The files that were written.

    Raises:
        InputError: no pretrained networks on a task of the original, or images that are missing or others.
    """
    folders, written = {task: names for names, task in FOLDERS.items()}, []
    records = [r for r in results.records() if r.get("task") in folders and r["protocol"] == "updates"]
    names = dict.fromkeys(r["task"] for r in records if results.has("weights", file_of(r["task"])))
    if not names:
        raise InputError(
            f"'{results.directory}' has no networks pretrained on a task of the original by the protocol 'updates'."
        )
    tasks = [load_task(name, data) for name in names]
    if fingerprint(tasks) != results.read_settings()["features"]["fingerprint"]:
        raise InputError(f"'{results.directory}' holds results on other images than those that were found.")
    for task in tasks:
        units = sorted({(r["amount"], r["repeat"], r["n"]) for r in records if r["task"] == task.name})
        if large := sorted({n for _, _, n in units if n > MOST_IMAGES}):
            sizes = " and ".join(f"{n:,}" for n in large)
            log.warning("Subsets of %s images are not clustered: they are too many.", sizes)
        units = [(amount, repeat) for amount, repeat, n in units if n <= MOST_IMAGES]
        entries = list(_entries(task, stored_networks(results, task.name), units, progress))
        folder, classes = folders[task.name]
        written.append(Path(directory) / folder / "results" / f"{classes}_cluster.json")
        with atomic_write(written[-1]) as path:
            path.write_text(json.dumps(entries, allow_nan=False), "utf-8")
    return written


def _entries(
    task: Task, stored: Mapping[int, tuple[Params, Params]], units: Sequence[tuple[float, int]], progress: bool
) -> Iterator[dict[str, object]]:
    """An entry for each unit (amount, repeat) and convolution; null where there are no clusters."""
    examples, params = task.finetuning(), next(iter(stored.values()))[1]
    (first, _), *others, _ = layers_of(params)
    outline = ConvNetworks(channels=len(params[first]), depth=1 + len(others)).outline(task.pretraining())
    for amount, repeat in tqdm(units, desc="Clustering", unit="subset", **({} if progress else {"disable": True})):
        rows = subset(task, examples, amount, repeat)
        labels, network = examples.labels[rows].numpy(), filled(outline, stored[repeat][1])
        for number, maps in enumerate(averaged_maps(network, examples.inputs[rows])):
            if not np.isfinite(maps).all():
                raise InputError(f"The pretrained network of repeat {repeat} of {task.name} is not finite.")
            where = {"Percentage": amount, "Repeat": repeat, "Layer": f"conv{number}"}
            yield where | _scores(maps, labels) | {"Dataset": "Finetune", "Split": "Train"}


@torch.no_grad()
def averaged_maps(network: ConvClassifier, images: Tensor) -> list[np.ndarray]:
    """What each convolution gives before its activation, averaged over the places: float32 ``[n, channels]`` each."""
    found = [[] for _ in network.convs]
    for seen in images.split(IMAGES_AT_A_TIME):
        for number, convolution in enumerate(network.convs):
            found[number].append(convolution(seen).mean((2, 3)))
            seen = network.block(seen, number)
    return [torch.cat(parts).numpy() for parts in found]


def _scores(maps: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Of clusters of the averaged maps of images, ``[n, channels]``."""
    pointing = maps.any(1)  # a row of zeros has no direction
    labels = labels[pointing]
    if len(classes := np.unique(labels)) < 2:
        return dict.fromkeys(("Precision", "Recall", "Accuracy", "ARI"))
    clusters = agglomerative(maps[pointing], len(classes))
    precision, recall = pair_scores(clusters, labels)
    values = precision, recall, matched_accuracy(clusters, labels), adjusted_rand_index(clusters, labels)
    named = zip(("Precision", "Recall", "Accuracy", "ARI"), values, strict=True)
    return {name: value if np.isfinite(value) else None for name, value in named}
