"""What several test files need: trees of images, a tiny random ViT in a local directory, a disk with little room."""

import os
import re
import shutil
import signal
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, a core for each; read when torch is loaded
SHARED = Path(__file__).resolve().parents[2] / "shared"
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]  # of the preprocessor of `vit`
VIT = {  # a tiny ViT
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
OLD = 1_000_000_000  # seconds since the epoch: images that were not written a moment ago


def make_images(root, domains=("art", "photo"), classes=("dog", "horse"), per_class=3, size=(36, 30), ending="png"):
    """Write root/domain/class/NNN.png with random pixels that depend on the path below `root` only."""
    for domain in domains:
        for label in classes:
            folder = Path(root) / domain / label
            folder.mkdir(parents=True)
            for number in range(per_class):
                name = f"{domain}/{label}/{number:03d}.{ending}"
                write_image(Path(root) / name, seed=zlib.crc32(name.encode()), size=size)
    return Path(root)


def write_image(path, seed=0, size=(36, 30), time=OLD):
    """Write random RGB pixels and date the file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    os.utime(path, (time, time))


def save_model(model_config, folder):
    """Save a random model of a `transformers` configuration, and a processor for images of 32×32."""
    import torch
    from transformers import AutoModel, ViTImageProcessor

    torch.manual_seed(0)
    AutoModel.from_config(model_config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def reference_features(folder, pixels):
    """What `transformers` itself makes of normalized pixels ``[B, 3, H, W]``: ``[CLS]`` of the last hidden state."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return getattr(model, "vision_model", model)(pixel_values=pixels).last_hidden_state[:, 0]


def make_vit(folder, seed=0, **processor_settings):
    """Save a random ViT (2 layers, patches of 8) and its image processor; images of 32×32."""
    import torch
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ViTModel(ViTConfig(**VIT)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, **processor_settings).save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> Path:
    """Directory of a tiny random ViT, 24-d."""
    return make_vit(tmp_path_factory.mktemp("models") / "tiny-vit")


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    """Another, whose preprocessor tells the channels apart. Read it, don't write to it."""
    return make_vit(tmp_path_factory.mktemp("models") / "vit", image_mean=MEAN, image_std=STD)


@pytest.fixture
def copy(vit, tmp_path) -> Path:
    """A copy of `vit` to damage."""
    return Path(shutil.copytree(vit, tmp_path / "copy"))


@pytest.fixture
def image_root(tmp_path) -> Path:
    """Two domains, two classes, three images of each."""
    return make_images(tmp_path / "toy")


@pytest.fixture(scope="session")
def shared_pacs() -> Path:
    """The real PACS images beside the checkout, where there are any."""
    root = SHARED / "data" / "pacs"
    if not root.is_dir():
        pytest.skip("no ../shared/data/pacs here")
    return root


@pytest.fixture(scope="session")
def shared_vit() -> Path:
    """The real ViT-Tiny beside the checkout, where there is one."""
    model = SHARED / "models" / "vit-tiny-patch16-224"
    if not model.is_dir():
        pytest.skip("no ../shared/models/vit-tiny-patch16-224 here")
    return model


@pytest.fixture
def small_disk():
    """``with small_disk(size):`` no file can become larger than so many bytes; what fits of a write is written."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    return limited


@pytest.fixture
def restored(monkeypatch, tmp_path):
    """For tests of commands, which set constants of `config` and the number of threads: they are put back afterwards.

    Nothing is cached outside `tmp_path`, and a commit meanwhile does not show in results.
    """
    import torch

    import config

    monkeypatch.setenv("GIT_DIR", os.devnull)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    constants, threads = {name: getattr(config, name) for name in config.names()}, torch.get_num_threads()
    yield
    config.apply(constants)
    torch.set_num_threads(threads)


@pytest.fixture
def command(restored, tmp_path, monkeypatch, capsys):
    """Runs a command in `tmp_path`: (exit code, standard output, lines of standard error without progress bars)."""
    from experiment import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse leaves this way
            code = stop.code
        printed, error = capsys.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", error) if line and not re.match(r"[\w -]+: +\d+%\|", line)]
        return code, printed, lines

    return call
