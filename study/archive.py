"""The files of a run: what they are called and what is in them. Nothing else spells a name of a file or a key.

=============================================  ================================================================
file                                           arrays, each with a leading seed axis; "seeds" in all of them
=============================================  ================================================================
``weights/phase1_<domain>``                    ``start.<parameter>``, ``final.<parameter>``, ``failed``
``weights/phase2_<holdout>_<arm>``             the same
``histories/phase1_<domain>``                  ``loss``, ``train_accuracy``, ``validation_accuracy``, ``failed``
``histories/phase2_<holdout>_<arm>``           the same, and ``correct``
``importance/phase1_<domain>``                 ``initial_<l>``, ``final_<l>``, ``importance_<l>``,
                                               ``normalized_<l>``, ``mask_<l>`` of tracked layer l, from 1
``importance/holdout_<holdout>``               ``importance_<l>``, ``normalized_<l>``, ``mask_<l>``; with the arm
                                               `importance` also ``initial_<l>`` and ``final_<l>`` of Phase 2
``evidence/<name>_<domain>``                   ``layer_<l>``: what a criterion needs beside the importance, by name
``histories/compare_<method>_<trial>_<held>``  ``loss``, ``validation_accuracy``, ``correct``, ``failed``, and what
                                               the method records; <held> joins two holdouts by "+"
``weights/compare_<method>_<trial>_<held>``    ``final.<parameter>``, ``failed``
=============================================  ================================================================

Networks that start from pretrained blocks are large, and all their starts are the same: of Phase 1 only the importance
is kept unless a method needs the networks, of Phase 2's masks the bits (``bits_<l>``, uint8 ``[S, out, ⌈in/8⌉]``), and
of its weights no start: ``final.<parameter>`` for the classifier, and for all others ``change.<parameter>``, float32,
what training has added to the pretrained value. A weight that was frozen has a change of exactly 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import InputError
from engine import Network, Params
from importance import CRITERIA, normalize, top_k_mask
from models import HEAD, BackboneTail
from storage import Results, check_arrays, damaged, load_arrays
from trainer_phase1 import DomainNetworks
from trainer_phase2 import HoldoutMasks, HoldoutNetworks

KINDS = ("importance", "histories", "weights")
CURVES = ("loss", "train_accuracy", "validation_accuracy")


class SavedNetworks:
    """Networks on disk, of one domain, or of one holdout and arm or method: S seeds. Files are read when asked for."""

    def __init__(self, archive: "Archive", name: str, seeds: Sequence[int] | None = None):
        self._archive, self.name = archive, name
        self._wanted = archive.seeds if seeds is None else tuple(seeds)

    def _arrays(self, kind: str) -> dict[str, Tensor]:
        """The arrays of one file, rows of the wanted seeds only."""
        arrays, _ = self._archive.read(kind, self.name)
        rows = torch.isin(arrays["seeds"], torch.tensor(self._wanted))
        return {name: value[rows] for name, value in arrays.items()}

    @property
    def _stored_kind(self) -> str:
        """A kind of file that there is of these networks."""
        return next((kind for kind in KINDS if self._archive.results.has(kind, self.name)), "histories")

    @property
    def header(self) -> dict:
        """What the files say of themselves."""
        return self._archive.read(self._stored_kind, self.name)[1]

    @cached_property
    def history(self) -> dict[str, Tensor]:
        """Per epoch: "loss", "train_accuracy", "validation_accuracy" ``[S, E]``, "correct"
        ``[S, E, domains, 2, classes]`` (where kept), "failed" ``[S]``, and what a method records.
        """
        return self._arrays("histories")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that were asked for and are there."""
        return tuple(self._arrays(self._stored_kind)["seeds"].tolist())

    @property
    def failed(self) -> Tensor:
        """Codes ``[S]``, 0 = none, see `engine.failure_reason`."""
        return self.history["failed"]

    @property
    def ok(self) -> Tensor:
        """Networks that did not fail: bool ``[S]``."""
        return self.failed == 0

    @property
    def curves(self) -> dict[str, Tensor]:
        """Loss and accuracies per epoch, float64 ``[E, S]``; NaN for failed networks."""
        return {k: self.history[k].double().masked_fill(~self.ok[:, None], torch.nan).T for k in CURVES}

    def layers(self, kind: str, file: str = "importance") -> list[Tensor]:
        """Tracked layers, L × ``[S, out, in]``: "initial", "final", "importance", "normalized" or "mask"."""
        arrays = self._arrays(file)
        if kind == "mask" and "bits_1" in arrays:
            widths = [layer.shape[-1] for layer in self._archive.network.tracked(self._archive.parameters)]
            return [_unpacked(arrays[f"bits_{i}"], width) for i, width in enumerate(widths, start=1)]
        return [arrays[name] for number in range(1, len(arrays)) if (name := f"{kind}_{number}") in arrays]

    def params(self, when: str = "final") -> Params:
        """Parameters at the "start" or at the end ("final"): name -> ``[S, *shape]``.

        Of trained blocks there is no "start", and "final" is exact but for the last bit of float32.
        """
        arrays = self._arrays("weights")
        found = _params(arrays, when)
        return found | _added(_params(arrays, "change"), self._archive.parameters) if when == "final" else found


class Archive:
    """Reads and writes the arrays of a run. What was read of a file is kept; of those only checked, the seeds are.

    Args:
        seeds: of the run; what is read is of these seeds alone.
        network: outline of the classifier.
        header: what every file says.

    Attributes:
        keeps_networks: whether the networks of Phase 1 are kept; by default not those with trained blocks, which are
            large, and needed by few methods.
    """

    def __init__(self, results: Results, seeds: Sequence[int], network: Network, header: Mapping):
        self.results, self.seeds, self.network, self.header = results, tuple(seeds), network, dict(header)
        self.parameters = dict(network.named_parameters())
        self.pretrained = not network.chained
        self.keeps_networks = not self.pretrained
        self._files: dict[tuple[str, str], tuple[dict[str, Tensor], dict]] = {}
        self._seeds: dict[tuple[str, str], set[int]] = {}

    def __getstate__(self) -> dict[str, object]:
        """What another machine reads: of the files, those of Phase 1 that are kept here; no directory."""
        files = {file: content for file, content in self._files.items() if content[1].get("phase") == 1}
        return vars(self) | {"results": None, "_files": files, "_seeds": {}}

    def keep_phase1(self, weights: bool = False) -> None:
        """Read all files of Phase 1, those of whole networks if `weights`, for where the directory is not."""
        kinds = ("importance", "histories", "weights") if weights else ("importance", "histories")
        evidence = self._measured(name for criterion in CRITERIA.values() for name in criterion.needs)
        for domain in self.header["domain_names"]:
            files = [(kind, f"phase1_{domain}") for kind in kinds]
            for file in (*files, *(("evidence", f"{name}_{domain}") for name in evidence)):
                if self.results.has(*file):
                    self.read(*file)

    def phase1(self, domain: str, seeds: Sequence[int] | None = None) -> SavedNetworks:
        """Phase 1 of a domain; of other seeds than the run's where `seeds` says so."""
        return SavedNetworks(self, f"phase1_{domain}", seeds)

    def phase2(self, holdout: str, arm: str) -> SavedNetworks:
        """Phase 2 of a holdout and an arm, by the arm's name."""
        return SavedNetworks(self, f"phase2_{holdout}_{arm}")

    def masks(self, holdout: str) -> SavedNetworks:
        """Aggregated importance and mask of a holdout, and the tracked weights of its arm `importance`."""
        return SavedNetworks(self, f"holdout_{holdout}")

    def method(self, method: str, trial: int, holdouts: Sequence[str]) -> SavedNetworks:
        """A method of the field: one trial, one or two held-out domains."""
        return SavedNetworks(self, _method_name(method, trial, holdouts))

    def phase1_seeds(self, domain: str) -> set[int]:
        """Seeds whose Phase 1 of a domain is complete."""
        kinds = KINDS if self.keeps_networks else ("importance", "histories")
        return set.intersection(*(self._stored_seeds(kind, f"phase1_{domain}") for kind in kinds))

    def evidence_seeds(self, domain: str, names: Iterable[str]) -> set[int]:
        """Seeds of which all that a criterion needs of a domain is there, see `importance.Criterion`."""
        files = (self._stored_seeds("evidence", f"{name}_{domain}") for name in self._measured(names))
        return self.phase1_seeds(domain).intersection(*files)

    def _measured(self, names: Iterable[str]) -> list[str]:
        """Of the evidence of these names, what has a file of its own; the rest follows from what is kept anyway."""
        known = {"distance", "start"} if self.pretrained else {"distance", "start", "change"}
        return sorted({*names} - known)

    def evidence(self, domain: str, name: str, seeds: Sequence[int]) -> list[Tensor]:
        """One kind of evidence of a domain, in the order of the seeds on disk: L × ``[S, out, in]``."""
        networks = self.phase1(domain, seeds)
        if name == "distance":
            return networks.layers("importance")
        if name == "start" and self.pretrained:
            layers = self.network.tracked(self.parameters)
            return [layer.detach().cpu().expand(len(networks.seeds), -1, -1) for layer in layers]
        if name == "start":
            return networks.layers("initial")
        if name == "change" and not self.pretrained:
            return [b - a for a, b in zip(networks.layers("initial"), networks.layers("final"), strict=True)]
        return SavedNetworks(self, f"{name}_{domain}", seeds).layers("layer", "evidence")

    def phase2_seeds(self, holdout: str, arms: Iterable[str], weights: bool) -> set[int]:
        """Seeds whose Phase 2 of a holdout is complete for all arms, with their weights where asked for."""
        stored = [self._trained_seeds(f"phase2_{holdout}_{arm}", weights) for arm in arms]
        return set.intersection(*stored, self._stored_seeds("importance", f"holdout_{holdout}"))

    def method_seeds(self, method: str, trial: int, holdouts: Sequence[str], weights: bool) -> set[int]:
        """Seeds whose training by a method is complete, with weights where asked for."""
        return self._trained_seeds(_method_name(method, trial, holdouts), weights)

    def _trained_seeds(self, name: str, weights: bool) -> set[int]:
        stored = self._stored_seeds("histories", name)
        return stored & self._stored_seeds("weights", name) if weights else stored

    def _stored_seeds(self, kind: str, name: str) -> set[int]:
        """Seeds that a file holds; none if it does not exist."""
        if not self.results.has(kind, name):
            return set()
        if (kind, name) not in self._seeds:  # weights that are read for this alone are not kept: they are large
            read = self._load if kind == "weights" else self.read
            arrays, _ = self._files.get((kind, name)) or read(kind, name)
            self._seeds[kind, name] = set(arrays["seeds"].tolist())
        return self._seeds[kind, name]

    def read(self, kind: str, name: str) -> tuple[dict[str, Tensor], dict]:
        """Arrays and header of a file, all of its seeds, checked; see `storage.load_arrays`."""
        if (kind, name) not in self._files:
            self._files[kind, name] = self._load(kind, name)
        return self._files[kind, name]

    def _load(self, kind: str, name: str) -> tuple[dict[str, Tensor], dict]:
        arrays, header = self.results.load(kind, name)
        check_arrays(kind, self.results.path(kind, name), arrays, header)
        return arrays, header

    def save_domain(self, networks: DomainNetworks, percent: float) -> None:
        """Write Phase 1 of a domain, with the mask that it alone would give at `percent` per cent."""
        name, header = f"phase1_{networks.domain}", self.header | {"phase": 1, "domain": networks.domain}
        layers = {"importance": networks.importance}
        if not self.pretrained:
            layers["initial"], layers["final"] = map(self.network.tracked, (networks.start, networks.final))
            layers["normalized"] = normalize(networks.importance)
            layers["mask"] = top_k_mask(networks.importance, percent)
        history = {key: getattr(networks, key) for key in (*CURVES, "failed")}
        self._write("importance", name, networks.seeds, _numbered(layers), header)
        self._write("histories", name, networks.seeds, history, header)
        if self.keeps_networks:
            final, start = networks.final, networks.start
            weights = self._changes(final) if self.pretrained else _weights(final, start)
            self._write("weights", name, networks.seeds, weights | {"failed": networks.failed}, header)

    def save_evidence(self, networks: DomainNetworks) -> None:
        """Write what was measured of a domain for criteria, a file for each kind."""
        for name in self._measured(networks.measured):
            header = self.header | {"phase": 1, "domain": networks.domain}
            layers = _numbered({"layer": networks.measured[name]})
            self._write("evidence", f"{name}_{networks.domain}", networks.seeds, layers, header)

    def save_holdout(self, networks: HoldoutNetworks, arms: Sequence[str], masks: HoldoutMasks, weights: bool) -> None:
        """Write Phase 2 of a holdout: a file per arm (names in the order of `networks`), and the holdout's masks."""
        seeds, about = networks.seeds, self.header | {"phase": 2, "holdout": networks.holdout}
        layers = {"importance": masks.scores, "normalized": masks.normalized, "mask": masks.mask}
        if self.pretrained:
            layers = {"bits": [_packed(layer) for layer in masks.mask]}
        for v, arm in enumerate(arms):
            name, header = f"phase2_{networks.holdout}_{arm}", about | {"algorithm": arm}
            start, final = ({k: value[:, v] for k, value in p.items()} for p in (networks.start, networks.final))
            history = {key: getattr(networks, key)[:, v] for key in (*CURVES, "correct", "failed")}
            self._write("histories", name, seeds, history, header)
            if weights:
                kept = self._changes(final) if self.pretrained else _weights(final, start)
                self._write("weights", name, seeds, kept | {"failed": history["failed"]}, header)
            if arm == "importance" and not self.pretrained:
                layers = {"initial": self.network.tracked(start), "final": self.network.tracked(final)} | layers
        self._write("importance", f"holdout_{networks.holdout}", seeds, _numbered(layers), about)

    def save_method(
        self, about: Mapping, seeds: Sequence[int], history: Mapping[str, Tensor], params: Params | None
    ) -> None:
        """Write what a method trained.

        Args:
            about: for the header: "algorithm", "trial", "holdouts" and what else is to be kept.
            history: name -> ``[S, …]``.
            params: final parameters, name -> ``[S, *shape]``; None = do not keep them.
        """
        name = _method_name(about["algorithm"], about["trial"], about["holdouts"])
        self._write("histories", name, seeds, history, self.header | about)
        if params is not None:
            kept = self._changes(params) if self.pretrained else _weights(params)
            weights = kept | {"failed": history["failed"]}
            self._write("weights", name, seeds, weights, self.header | about)

    def _changes(self, final: Params) -> dict[str, Tensor]:
        """Arrays of networks with trained blocks: their classifiers, and by how much all other parameters changed."""
        head = {name: value for name, value in final.items() if name.startswith(HEAD)}
        rest = {name: value for name, value in final.items() if name not in head}
        changes = {name: value - self.parameters[name].detach().cpu() for name, value in rest.items()}
        return _weights(head) | {f"change.{name}": value for name, value in changes.items()}

    def _write(self, kind: str, name: str, seeds: Sequence[int], arrays: Mapping[str, Tensor], header: Mapping) -> None:
        for known in (self._files, self._seeds):
            known.pop((kind, name), None)
        self.results.save(kind, name, seeds, arrays, header)


def load_networks(path) -> tuple[tuple[int, ...], Params, Tensor, dict]:
    """Seeds, final parameters ``[S, *shape]``, failure codes ``[S]`` and header of a file of ``weights/``.

    With trained blocks, only the classifier is final and checked; the other parameters are changes of the pretrained
    ones, see `add_pretrained`.

    Raises:
        InputError: the file is missing or damaged, or holds no networks.
    """
    arrays, header = load_arrays(path)
    params = _params(arrays, "final")
    if not params:
        raise InputError(f"'{path}' holds no networks: give a file of results/weights/.")
    check_arrays("weights", Path(path), arrays, header)
    sizes = [header["features"]["feature_size"], *header["hidden_sizes"], len(header["class_names"])]
    blocks = header.get("trained_blocks", 0)
    if not isinstance(blocks, int) and blocks != "all":
        raise damaged(f"'{path}'", "its header does not say how many blocks were trained")
    head = HEAD if blocks else ""
    if head and header.get("tokens") not in ("float16", "float32", "uint8"):
        raise damaged(f"'{path}'", "its header does not say in which type tokens were stored")
    wanted = {f"{head}layers.{i}.weight": (b, a) for i, (a, b) in enumerate(pairwise(sizes))}
    wanted |= {f"{head}layers.{i}.bias": (b,) for i, b in enumerate(sizes[1:])}
    _check_shapes(path, {name: tuple(value.shape[1:]) for name, value in params.items()}, wanted, "as its header says")
    params |= _params(arrays, "change")
    return tuple(arrays["seeds"].tolist()), params, arrays.get("failed", torch.zeros_like(arrays["seeds"])), header


def add_pretrained(path, params: Params, tail: BackboneTail) -> Params:
    """Final parameters of a network with trained blocks.

    Args:
        path: of the weights file, for messages.
        params: of a network, as `load_networks` gives them: the classifier, and changes of all others.
        tail: the model's own blocks, without a classifier.

    Raises:
        InputError: the parameters are not those of these blocks.
    """
    changes, pretrained = {n: v for n, v in params.items() if not n.startswith(HEAD)}, dict(tail.named_parameters())
    shapes = ({name: tuple(value.shape) for name, value in found.items()} for found in (changes, pretrained))
    _check_shapes(path, *shapes, "as its model has it")
    return params | _added(changes, pretrained)


def _check_shapes(path, found: Mapping[str, tuple], wanted: Mapping[str, tuple], what: str) -> None:
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise damaged(f"'{path}'", f"{wrong[0]} is not {what}")


def _packed(mask: Tensor) -> Tensor:
    """Bool ``[S, out, in]`` -> uint8 ``[S, out, ⌈in/8⌉]``, eight to a byte."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1))


def _unpacked(bits: Tensor, width: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=width)).bool()


def _params(arrays: Mapping[str, Tensor], when: str) -> Params:
    return {name.removeprefix(f"{when}."): v for name, v in arrays.items() if name.startswith(f"{when}.")}


def _method_name(method: str, trial: int, holdouts: Sequence[str]) -> str:
    return f"compare_{method}_{trial}_{'+'.join(holdouts)}"


def _numbered(layers: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    return {f"{kind}_{i}": layer for kind, stack in layers.items() for i, layer in enumerate(stack, start=1)}


def _weights(final: Params, start: Params | None = None) -> dict[str, Tensor]:
    kinds = {"start": start or {}, "final": final}
    return {f"{kind}.{name}": value for kind, params in kinds.items() for name, value in params.items()}


def _added(changes: Params, pretrained: Params) -> Params:
    """Parameters of which the changes are known, of one network or of a stack."""
    return {name: pretrained[name].detach().cpu() + change for name, change in changes.items()}
