"""The methods of the field: what they are, how they are compared, and how results are exchanged with DomainBed.

Figures are in `field.figures`, which imports matplotlib and is therefore not imported here.
"""

import storage  # noqa: F401 - first: it says if a module of another project hides one of this
from field.algorithms import ALGORITHMS, Algorithm, Batch, Hyperparameter, Setup, find, register
from field.algorithms.base import choice, log_uniform, uniform
from field.compare import PARTNERS, Comparison
from field.curves import curves_of
from field.docs import comparison_tables
from field.domainbed import domainbed_tables, export_domainbed, export_runs, import_runs
from field.report import ensemble, failed, write
from field.selection import HEADLINE, RULES, as_text, comparison_table, select, tables_by_rule
from field.train import train_method

__all__ = [
    "ALGORITHMS",
    "HEADLINE",
    "PARTNERS",
    "RULES",
    "Algorithm",
    "Batch",
    "Comparison",
    "Hyperparameter",
    "Setup",
    "as_text",
    "choice",
    "comparison_table",
    "comparison_tables",
    "curves_of",
    "domainbed_tables",
    "ensemble",
    "export_domainbed",
    "export_runs",
    "failed",
    "find",
    "import_runs",
    "log_uniform",
    "register",
    "select",
    "tables_by_rule",
    "train_method",
    "uniform",
    "write",
]
