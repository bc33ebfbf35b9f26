"""How sure the result is: the comparison fixed in advance, statistics, diagnostics, linear probe and report."""

from evidence.contrasts import FAMILY, OTHERS, Contrast, family_table, others_table, seed_averages, sweep_table
from evidence.diagnostics import domain_overlap, mask_density, seed_stability, zero_importance
from evidence.docs import benchmark_tables, markdown_table, paragraph, results_tables, write_pages
from evidence.linear_probe import linear_probe
from evidence.protocol import Protocol, forest_figure
from evidence.statistics import MARGIN, bootstrap_interval, family, holm, seeds_needed, verdict, wilcoxon_p

__all__ = [
    "FAMILY",
    "MARGIN",
    "OTHERS",
    "Contrast",
    "Protocol",
    "benchmark_tables",
    "bootstrap_interval",
    "domain_overlap",
    "family",
    "family_table",
    "forest_figure",
    "holm",
    "linear_probe",
    "markdown_table",
    "mask_density",
    "others_table",
    "paragraph",
    "results_tables",
    "seed_averages",
    "seed_stability",
    "seeds_needed",
    "sweep_table",
    "verdict",
    "wilcoxon_p",
    "write_pages",
    "zero_importance",
]
