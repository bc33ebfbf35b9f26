"""How sure the result is: the comparison fixed in advance, statistics, diagnostics, linear probe and report.

Figures are in `evidence.figures`, which imports matplotlib and is therefore not imported here.
"""

import storage  # noqa: F401 - first: it says if a module of another project hides one of this
from evidence.blocks import BlockProtocol, block_findings
from evidence.columns import ColumnProtocol
from evidence.confirmation import Confirmation
from evidence.contrasts import FAMILY, OTHERS, Contrast, family_table, others_table, seed_averages, sweep_table
from evidence.diagnostics import domain_overlap, mask_density, seed_stability, zero_importance
from evidence.docs import benchmark_tables, data_tables, markdown_table, paragraph, results_tables, write_pages
from evidence.forms import FormsProtocol
from evidence.linear_probe import kept_probe, linear_probe, probe_words
from evidence.protocol import Protocol
from evidence.report import family_shown, interval, with_interval
from evidence.statistics import bootstrap_interval, family, holm, seeds_needed, verdict, wilcoxon_p

__all__ = [
    "FAMILY",
    "OTHERS",
    "BlockProtocol",
    "ColumnProtocol",
    "Confirmation",
    "Contrast",
    "FormsProtocol",
    "Protocol",
    "benchmark_tables",
    "block_findings",
    "bootstrap_interval",
    "data_tables",
    "domain_overlap",
    "family",
    "family_shown",
    "family_table",
    "holm",
    "interval",
    "kept_probe",
    "linear_probe",
    "markdown_table",
    "mask_density",
    "others_table",
    "paragraph",
    "probe_words",
    "results_tables",
    "seed_averages",
    "seed_stability",
    "seeds_needed",
    "sweep_table",
    "verdict",
    "wilcoxon_p",
    "with_interval",
    "write_pages",
    "zero_importance",
]
