"""How many layers of a trained network carry over to new classes: keep, freeze, draw anew or remove the rest.

Figures are in `transfer.figures`, which imports matplotlib and is therefore not imported here. For those who look
inside, `transfer.arms` says what an arm keeps, and `transfer.training` trains a stack of networks.
"""

import storage  # noqa: F401 - first: it says if a module of another project hides one of this
from transfer.arms import KINDS, CutArm, arms_of
from transfer.blocks import TailNetworks
from transfer.convnet import ConvClassifier, load_original
from transfer.docs import transfer_tables
from transfer.features import FeatureNetworks, FeatureTask, feature_tasks
from transfer.images import PRESETS, Examples, ImageSet, Task, find_images, load_images, load_task, nested_rows
from transfer.networks import ConvNetworks
from transfer.original import OriginalSettings
from transfer.original_clusters import export_clusters
from transfer.original_files import export_original, import_original
from transfer.original_study import OriginalStudy
from transfer.plan import make_study, without_effect
from transfer.study import TransferSettings, TransferStudy
from transfer.tables import long_table

__all__ = [
    "KINDS",
    "PRESETS",
    "ConvClassifier",
    "ConvNetworks",
    "CutArm",
    "Examples",
    "FeatureNetworks",
    "FeatureTask",
    "ImageSet",
    "OriginalSettings",
    "OriginalStudy",
    "TailNetworks",
    "Task",
    "TransferSettings",
    "TransferStudy",
    "arms_of",
    "export_clusters",
    "export_original",
    "feature_tasks",
    "find_images",
    "import_original",
    "load_images",
    "load_original",
    "load_task",
    "long_table",
    "make_study",
    "nested_rows",
    "transfer_tables",
    "without_effect",
]
