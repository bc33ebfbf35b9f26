"""A results directory as one page to look at: the finding, every figure, tables that sort and filter, the settings."""

import storage  # noqa: F401 - first: it says if a module of another project hides one of this
from report.page import write_page

__all__ = ["write_page"]
