"""Processes that train together, started and watched by tests, and what is compared of two trainings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import torch

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.plan import Plan
from onetrans.settings import as_environment

DEADLINE_S = 280
BOUND_S = 60
"""Within so many seconds of a death nothing of a training runs any more: 30 of ``torchrun``, 30 spare."""


def copied(plan, folder):
    folder.mkdir(parents=True)
    shutil.copy(storage.local_path(plan.path) / "plan.json", folder / "plan.json")
    return Plan.load(str(folder))


def torchrun(processes, arguments, settings):
    return started(
        ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "onetrans.train", *arguments],
        settings,
    )


def started(module_and_arguments, settings, **options):
    return subprocess.Popen(
        [sys.executable, "-m", *module_and_arguments],
        env={**os.environ, **as_environment(settings), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process):
    """Wait for a process; return its exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    return process.returncode, out, err


def losses_of(plan, model_name):
    text = storage.read_bytes(storage.join(plan.model_path(model_name), "losses.csv")).decode()
    return np.loadtxt(text.splitlines(), delimiter=",", skiprows=1, ndmin=2)


def assert_trained_alike(mine, theirs, model_name, table_norms=(1.0, 1.0)):
    """Compare losses, norms and weights of two trainings, up to the rounding of another order of addition.

    The norms of table gradients may be so many times the others', at least and at most.
    """
    found, expected = losses_of(mine, model_name), losses_of(theirs, model_name)
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], rtol=2e-4, atol=1e-6)
    ratio = found[:, -1] / expected[:, -1]
    assert table_norms[0] * (1 - 2e-4) < ratio.min()
    assert ratio.max() < table_norms[1] * (1 + 2e-4)
    weights, expected = (
        load_model(storage.join(plan.model_path(model_name), "model"))[0].state_dict() for plan in (mine, theirs)
    )
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # A batch norm takes the mean away, so the gradient of a shift before it is rounding alone, which AdamW takes
        # for a direction.
        if ".norm.running_mean" in name or (name.startswith("mlp.") and name.endswith(".bias") and "norm" not in name):
            continue
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def ranks_under(launcher):
    """Return the processes that train, by number, once all are there."""
    found = {}
    for child in psutil.Process(launcher.pid).children():
        number = child.environ().get("RANK")
        if number is not None:
            found[int(number)] = child
    return found


def wait_for_step(plan, model_name, step, launcher):
    path = storage.local_path(plan.model_path(model_name)) / "checkpoint" / "checkpoint.json"
    deadline = time.monotonic() + DEADLINE_S
    while not (path.exists() and json.loads(path.read_bytes())["step"] >= step):
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return json.loads(path.read_bytes())["step"]


def stopping():
    """An event that asks a training to stop after its next step."""
    stop = threading.Event()
    stop.set()
    return stop
