"""Whole studies as processes of their own, timed from start to exit."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

from plain import timed

from config import InputError

ROOT = Path(__file__).resolve().parents[1]
WHOLE = """
import sys
from config import Settings
from features import get_features
from records import Results
from study import Study
from variants import VARIANTS

data, settings = get_features(), Settings.current()
arms = {{"algorithms": VARIANTS[:{variants}], "keep_weights": False, "progress": False}}
study = Study(data, settings, Results(sys.argv[1]), range({seeds}), **arms)
study.phase1()
study.phase2()
"""


def study_seconds(seeds: int, variants: int | None) -> float:
    """Seconds of a study on the bundled features, from start to exit: ``experiment.py run``, or all of `variants`."""
    with tempfile.TemporaryDirectory() as folder:
        if variants is None:
            run = ["experiment.py", "run", "--seeds", str(seeds), "--no-figures", "--results-dir", folder]
        else:
            run = ["-c", WHOLE.format(seeds=seeds, variants=variants), folder]
        done = []
        start = functools.partial(subprocess.run, [sys.executable, *run], capture_output=True, text=True)
        seconds = timed(lambda: done.append(start(cwd=ROOT, check=False)))
    if done[0].returncode:
        said = done[0].stderr.strip().splitlines()
        raise InputError(f"The study of {seeds} seeds did not end well: {said[-1] if said else 'no reason given'}")
    return seconds
