"""Shared by all tests: a private cache, no network, one thread, Ctrl-C as in a terminal."""

import os
import signal
import sys

import pytest
import torch

# Networks this small are no faster on two threads, and tests run side by side: threads that wait for a core keep others
# from it (up to ten times slower). Children get one too, so that they compute the same bits.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it, and children inherit that


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    """Every test has a cache of its own and is offline unless it says otherwise."""
    monkeypatch.setenv("EFFICIENTFORMER_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("EFFICIENTFORMER_OFFLINE", "1")


@pytest.fixture
def cli(monkeypatch, capfd):
    """Run the command line in this process: ``code, out, err = cli("predict", "x.jpg")``."""
    from efficientformer.cli.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["efficientformer", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def no_training_report(monkeypatch):
    """The plots of a run take longer than a training of two epochs; for tests of something else."""
    from efficientformer.training import run

    monkeypatch.setattr(run, "write_report", lambda *_: None)
