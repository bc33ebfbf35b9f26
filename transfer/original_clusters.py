"""How well the classes of the new task cluster in each layer, as the result files of tusharmanekar/mp-tl-study say it.

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
from tqdm.auto import tqdm

from config import InputError
from engine import Params
from storage import Results, atomic_write
from transfer import study
from transfer.arms import layers_of
from transfer.images import Task, load_task
from transfer.networks import ConvNetworks
from transfer.original_files import FOLDERS
from transfer.probes import adjusted_rand_index, agglomerative, matched_accuracy
from transfer.probes import layers_of as maps_of

log = logging.getLogger(__name__)

MOST_IMAGES = 6000  # of a subset: the memory for the distances grows with its square


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
    records = [r for r in results.records() if r["task"] in folders and r["protocol"] == "updates"]
    names = dict.fromkeys(r["task"] for r in records if results.has("weights", study.file_of(r["task"])))
    if not names:
        raise InputError(f"'{results.directory}' has no pretrained networks on a task of the original.")
    for name in names:
        task = load_task(name, data)
        if study.fingerprint([task]) != results.read_settings()["features"]["fingerprint"]:
            raise InputError(f"'{results.directory}' is of other images than those of {name} that --data names.")
        units = sorted({(r["amount"], r["repeat"], r["n"]) for r in records if r["task"] == name})
        if large := sorted({n for _, _, n in units if n > MOST_IMAGES}):
            log.warning(
                "Subsets of %s images are not clustered: they are too many.", " and ".join(f"{n:,}" for n in large)
            )
        units = [(amount, repeat) for amount, repeat, n in units if n <= MOST_IMAGES]
        entries = list(_entries(task, study.stored_networks(results, name), units, progress))
        folder, classes = folders[name]
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
        rows = study.subset(task, examples, amount, repeat)
        labels, network = examples.labels[rows].numpy(), study.filled(outline, stored[repeat][1])
        for number, layer in enumerate(maps_of(network, examples.inputs[rows])):
            if layer.maps is not None:
                where = {"Percentage": amount, "Repeat": repeat, "Layer": f"conv{number - 1}"}
                yield where | _scores(layer.maps, labels) | {"Dataset": "Finetune", "Split": "Train"}


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
