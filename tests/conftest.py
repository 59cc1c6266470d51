import signal
import sys
from pathlib import Path

import pytest

from test_scripts import SCRIPTS, no_plots, script, trained  # noqa: F401 (fixtures)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


@pytest.fixture(autouse=True)
def cache_here(monkeypatch):
    """What is decoded or trained once is kept in the working folder of a test, and not beside the scripts."""
    for name in [*SCRIPTS, "fid"]:
        if hasattr(sys.modules.get(name), "CACHE"):
            monkeypatch.setattr(sys.modules[name], "CACHE", Path("data", "cache"))
