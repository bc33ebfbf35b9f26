"""Features on disk: the format, its checks, and `FeatureSet`, which everything after the ViT works on.

One safetensors file holds the features of a data set:

=============  =======  ======  ================================================
tensor         type     shape   meaning
=============  =======  ======  ================================================
``features``   float16  [N, D]  one row per image (other float types are read too)
``labels``     int64    [N]     index into ``class_names``
``domains``    int64    [N]     index into ``domain_names``
=============  =======  ======  ================================================

Its metadata has one key, ``header``: JSON with ``format_version`` (1), ``class_names``, ``domain_names``, and
optionally ``files`` (N unique names), ``dataset``, ``counts`` (domain -> class -> number of images), ``model``,
``preprocessing``, ``pixels_sha256``, ``versions``, and ``layers`` where a row is ``[blocks, kinds, width]`` of every
block of a ViT: ``{"blocks": 12, "kinds": ["cls", "mean"], "width": 192}``. There is one key only because safetensors
writes several in random order, and there are neither times nor paths, so that the same features are the same bytes.
``data/README.md`` describes the format for users' own features.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from config import InputError
from storage.atomic import atomic_write

FORMAT_VERSION = 1
ROWS = 2**12  # checked at a time
UNPRINTABLE = r"[\0\ud800-\udfff]"  # NUL, and halves of characters, which UTF-8 has no bytes for


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of every image of a data set, with labels and domains: a feature file, see the module's docstring.

    Attributes:
        features: memory-mapped when loaded.
        files: unique name of each row, ``"domain/class/file.jpg"`` where it comes from an image.
        source: where they came from, for announcements.
        tokens: ``[N, T, D]`` before the last blocks of the ViT, float16 or float32, memory-mapped; None unless
            `features.get_features` was asked for them. Then ``header["tokens"]`` has the number of ``blocks``, T
            (``tokens``) and the ``type``.
        tail: those blocks, pretrained: a `models.BackboneTail` without a classifier, tokens in and features out.
    """

    features: Tensor
    labels: Tensor
    domains: Tensor
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    files: tuple[str, ...]
    header: dict
    source: str
    tokens: Tensor | None = None
    tail: nn.Module | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def feature_size(self) -> int:
        """D, the length of a feature vector."""
        return self.features.shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_domains(self) -> int:
        return len(self.domain_names)

    @property
    def dataset(self) -> str:
        return self.header["dataset"]

    @property
    def model_name(self) -> str:
        return self.header.get("model", {}).get("name", "unknown model")

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 over the tensors' bytes and all names.

        Of tokens it is not the bytes, which would take long to read, but what determines them besides the images.
        """
        digest = hashlib.sha256()
        for tensor in (self.features, self.labels, self.domains):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
        digest.update(json.dumps([self.class_names, self.domain_names, self.files]).encode())
        if self.tokens is not None:
            weights = self.header["model"]["weights_sha256"]
            digest.update(json.dumps([self.header["tokens"], weights], sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def describe(self) -> str:
        """One line: what these features are and where they came from."""
        size = f"{len(self)} × {self.feature_size}-d"
        if "layers" in self.header:
            size += " of all layers"
        if self.tokens is not None and self.header["tokens"]["blocks"] == "all":
            size += " and the images themselves"
        elif self.tokens is not None:
            blocks = self.header["tokens"]["blocks"]
            last = "last block" if blocks == 1 else f"last {blocks} blocks"
            size += f" and {self.tokens.shape[1]} tokens of each image before the {last}"
        return (
            f"{self.dataset} features: {size}, {self.model_name}, "
            f"{self.num_domains} domains, {self.num_classes} classes ({self.source})"
        )


_OWN_KEYS = {"format_version", "class_names", "domain_names", "files", "counts"}  # save_features writes these itself


def save_features(
    path: str | os.PathLike,
    features: Tensor,
    labels: Tensor,
    domains: Tensor,
    class_names: Sequence[str],
    domain_names: Sequence[str],
    files: Sequence[str] | None = None,
    **header,
) -> Path:
    """Write a feature file, whole or not at all; what `load_features` would refuse is refused here too.

    Args:
        path: the file, usually ``*.safetensors``; folders above it are created.
        features: floating point ``[N, D]``, stored in their type.
        labels, domains: integers ``[N]``, indices into the names; every domain must hold every class.
        class_names, domain_names: unique names.
        files: unique name of each row; default ``row000000``, ``row000001``, ….
        **header: further entries of the header, ready for JSON: ``dataset="name"``, ``model={"name": …}``, ….

    Raises:
        InputError: the parts are inconsistent, or the file cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if taken := sorted(_OWN_KEYS & header.keys()):
        raise InputError(f"The header entry '{taken[0]}' is written by save_features itself.")
    tensors = {"features": features, "labels": labels, "domains": domains}
    tensors = {name: torch.as_tensor(tensor).detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"dataset": path.stem, **header, "format_version": FORMAT_VERSION}
    header.update(class_names=list(class_names), domain_names=list(domain_names))
    if files is not None:
        header["files"] = list(files)
    _complete(f"'{path}'", tensors, header)
    tensors["labels"], tensors["domains"] = tensors["labels"].long(), tensors["domains"].long()
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"header": json.dumps(header, sort_keys=True)})
    return path


def copy_features(features: FeatureSet, output: str | os.PathLike) -> Path:
    """Write features, without tokens, to another file: byte for byte the one that they were loaded from."""
    dropped = _OWN_KEYS if features.tokens is None else _OWN_KEYS | {"tokens"}
    header = {key: features.header[key] for key in features.header.keys() - dropped}
    names = features.class_names, features.domain_names, features.files
    return save_features(output, features.features, features.labels, features.domains, *names, **header)


def load_features(path: str | os.PathLike, source: str | None = None) -> FeatureSet:
    """Load a feature file, this project's or a user's own; the features stay on disk, mapped into memory.

    Args:
        source: where they come from, for `FeatureSet.describe`; default the file's name.

    Raises:
        InputError: no such file, another format, or inconsistent parts; names the file and the fault.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no feature file '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{path}' is not a complete safetensors file: {error}.") from error
    header = {key: value for key, value in _read_header(f"'{path}'", metadata).items() if value is not None}
    header.setdefault("dataset", path.stem)
    _complete(f"'{path}'", tensors, header)
    return FeatureSet(
        features=tensors["features"],
        labels=tensors["labels"].long(),
        domains=tensors["domains"].long(),
        class_names=tuple(header["class_names"]),
        domain_names=tuple(header["domain_names"]),
        files=tuple(header["files"]),
        header=header,
        source=path.name if source is None else source,
    )


def _read_header(where: str, metadata: dict[str, str]) -> dict:
    try:
        header = json.loads(metadata["header"])
    except (KeyError, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{where} has no JSON under 'header' in its metadata; write it with save_features.")
    if (version := header.get("format_version")) != FORMAT_VERSION:
        raise InputError(f"{where} has format version {version}; this version of the project reads {FORMAT_VERSION}.")
    return header


def _complete(where: str, tensors: dict[str, Tensor], header: dict) -> None:
    """Name and count the rows in the header; raise an `InputError` for the first fault in a feature file."""
    _check_tensors(where, tensors)
    rows = len(tensors["features"])
    header.setdefault("files", [f"row{row:06d}" for row in range(rows)])
    for key in ("class_names", "domain_names", "files"):
        names = header.get(key)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"{where} must name its {key} in the header, as a list of strings that are not empty.")
        if len(set(names)) < len(names):
            raise InputError(f"{where} has '{Counter(names).most_common(1)[0][0]}' twice in its {key}.")
    for name in (*header["class_names"], *header["domain_names"]):
        if name.startswith(".") or "/" in name or "\\" in name or re.search(UNPRINTABLE, name):
            raise InputError(
                f"{where} has the name {name!r}: names become file names, without slashes, a first dot or unprintable "
                "characters."
            )
    model = header.get("model", {"name": ""})
    if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not isinstance(header["dataset"], str):
        raise InputError(f"{where} must have in its header a dataset name and, if at all, a model like {{'name': …}}.")
    if not isinstance(header.get("preprocessing", {}), dict):
        raise InputError(
            f"{where} must have in its header as preprocessing, if at all, an object like {{'size': 224}}."
        )
    for name in (header["dataset"], model["name"]):
        if re.search(UNPRINTABLE, name):
            raise InputError(f"{where} has the name {name!r} in its header, which cannot be printed.")
    if len(header["files"]) != rows:
        raise InputError(f"{where} has {rows} rows of features but {len(header['files'])} names in files.")
    if len(header["domain_names"]) < 2:
        raise InputError(f"{where} has one domain only; leave-one-domain-out needs two or more.")
    for tensor, key in (("labels", "class_names"), ("domains", "domain_names")):
        values = tensors[tensor].long()  # the unsigned types have no min
        low, high, count = int(values.min()), int(values.max()), len(header[key])
        if low < 0 or high >= count:
            raise InputError(f"{where} has {tensor} from {low} to {high}, but {count} {key} (0 to {count - 1}).")
    header["counts"] = _counts(tensors["labels"], tensors["domains"], header["class_names"], header["domain_names"])
    for domain, classes in header["counts"].items():
        for label, count in classes.items():
            if not count:
                raise InputError(f"{where} has no images of class '{label}' in domain '{domain}'.")


def _check_tensors(where: str, tensors: dict[str, Tensor]) -> None:
    if missing := [name for name in ("features", "labels", "domains") if name not in tensors]:
        raise InputError(f"{where} has no tensor '{missing[0]}'; needed are features, labels and domains.")
    features = tensors["features"]
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"{where} must have features of shape [N, D], not {list(features.shape)}.")
    if not features.is_floating_point():
        raise InputError(f"{where} must have floating-point features, not {features.dtype}.")
    for name in ("labels", "domains"):
        kind, shape = tensors[name].dtype, list(tensors[name].shape)
        if kind.is_floating_point or kind.is_complex or kind == torch.bool:
            raise InputError(f"{where} must have integer {name}, not {kind}.")
        if shape != [len(features)]:
            raise InputError(f"{where} has {name} of shape {shape} for {len(features)} rows of features.")
    for start in range(0, len(features), ROWS):
        finite = features[start : start + ROWS].float().isfinite().all(1)  # training uses float32
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise InputError(f"{where} has features that are not finite, first in row {row}.")


def _counts(labels: Tensor, domains: Tensor, class_names: list, domain_names: list) -> dict[str, dict[str, int]]:
    """Number of images by domain and class name."""
    size = len(class_names)
    table = torch.bincount(domains.long() * size + labels.long(), minlength=size * len(domain_names)).view(-1, size)
    return {d: dict(zip(class_names, row, strict=True)) for d, row in zip(domain_names, table.tolist(), strict=True)}
