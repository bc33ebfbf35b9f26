"""The importance of columns: closed forms, planted features, and a study that goes on from its records."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch

import config
from config import InputError, Settings
from engine import fit_linear
from evidence import columns
from evidence.columns import (
    ALL,
    BEST,
    CRITERIA,
    DENSITIES,
    LAST,
    STRENGTHS,
    Choice,
    ColumnProtocol,
    Layout,
    arms_of,
    at_chosen,
    block_findings,
    chosen_strengths,
    column_importance,
    kept_columns,
)
from evidence.figures import save_columns
from study import Execution, Run
from tests.factories import blobs, dated, everything, make_record, save_blobs
from storage import load_features, save_features

LAYOUT = Layout(3, ("cls", "mean"), 10)
SETTINGS = Settings.current()
