"""The project's own question: Phase 1 and 2 for all seeds, holdouts and arms; tables, report, figures, prediction.

Figures are in `study.figures`, which imports matplotlib and is therefore not imported here.
"""

import storage  # noqa: F401 - first: it says if a module of another project hides one of this
from study.archive import Archive, SavedNetworks, load_networks
from study.controls import (
    BOTH_STARTS,
    CONTROLS,
    ERM,
    IMPORTANCE,
    Arm,
    MaskSource,
    permuted_mask,
    permuted_matrices,
    random_layer_mask,
)
from study.masks import densities, expected_overlap, layer_statistics, overlap, overlap_table, statistics_table
from study.predict import predict_images
from study.records import SELECTIONS, Counted, make_records
from study.report import bottleneck, covered, finding, unlearned
from study.run import (
    Execution,
    Run,
    check_before_extraction,
    check_holdouts,
    check_seeds,
    clear_results,
    current_execution,
)
from study.study import Study, mask_source
from study.tables import (
    AVERAGE,
    FEWEST_SEEDS,
    MARGIN,
    WITHOUT_HARDEST,
    accuracy_table,
    levels,
    lodo_table,
    paired_differences,
    t_interval,
    wide_table,
)

__all__ = [
    "AVERAGE",
    "BOTH_STARTS",
    "CONTROLS",
    "ERM",
    "FEWEST_SEEDS",
    "IMPORTANCE",
    "MARGIN",
    "SELECTIONS",
    "WITHOUT_HARDEST",
    "Archive",
    "Arm",
    "Counted",
    "Execution",
    "MaskSource",
    "Run",
    "SavedNetworks",
    "Study",
    "accuracy_table",
    "bottleneck",
    "check_before_extraction",
    "check_holdouts",
    "check_seeds",
    "clear_results",
    "covered",
    "current_execution",
    "densities",
    "expected_overlap",
    "finding",
    "layer_statistics",
    "levels",
    "load_networks",
    "lodo_table",
    "make_records",
    "mask_source",
    "overlap",
    "overlap_table",
    "paired_differences",
    "permuted_mask",
    "permuted_matrices",
    "predict_images",
    "random_layer_mask",
    "statistics_table",
    "t_interval",
    "unlearned",
    "wide_table",
]
