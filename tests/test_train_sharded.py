"""`examples/train_sharded.py` on one device, on eight, in two processes, and killed.

Every run is one of its own processes, on the CPU, of a model so small that starting is what takes
the time. Curves are compared with that of one device: sums over a batch that is split are taken in
another order, which was seen to make 4e-7 of difference within 50 steps. A batch that is not the
same, or a gradient that is not summed, makes far more.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_sharded  # noqa: E402

SCRIPT = EXAMPLES / "train_sharded.py"
STEPS = 50
TINY = ["--layers=1", "--width=32", "--heads=4", "--rank=2", "--batch=8", "--sequence=16"]
ROUNDING = 1e-5
# Runs the example and kills it: SECONDS after step AT begins, and before step STOP does.
KILLED = """
import os, signal, sys, threading, time
import library_text, train_sharded

at, stop, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
batch = library_text.Batches.__call__

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(self, step):
    if step == at:
        threading.Timer(seconds, kill).start()
    if step == stop:
        time.sleep(60)
    return batch(self, step)

library_text.Batches.__call__ = counted
train_sharded.main(sys.argv[4:])
"""


def start(*arguments: object, devices: int = 1) -> subprocess.Popen[str]:
    """Start this interpreter on so many CPU devices, with the examples to be imported."""
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("JAX_")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_FUSED_LORA_METAL": "never",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")])),
        "COLUMNS": "200",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """What the processes printed, once all have ended well."""
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (printed, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, f"{printed}\n{errors}"
    return [printed for printed, _ in said]


def losses(path: Path, steps: int = STEPS) -> np.ndarray:
    """The losses of a curve that has every step once, in order."""
    curve = json.loads(path.read_text())
    assert [number for number, _ in curve] == list(range(1, steps + 1))
    return np.array([loss for _, loss in curve])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The losses on one device, in one process, not interrupted."""
    path = tmp_path_factory.mktemp("alone") / "curve.json"
    (printed,) = finish(start(SCRIPT, *TINY, f"--steps={STEPS}", "--loss-json", path))
    assert "1 × cpu (platform cpu) in 1 process; mesh: data 1 × model 1" in printed
    assert f"{STEPS}/{STEPS}" in printed
    assert "tokens/s, loss " in printed
    found = losses(path)
    assert found[-5:].mean() < found[:5].mean() - 0.5  # It learns.
    return found


def test_eight_devices_have_the_curve_of_one(alone, tmp_path):
    path = tmp_path / "curve.json"
    (printed,) = finish(
        start(
            *(SCRIPT, *TINY, f"--steps={STEPS}", "--loss-json", path),
            *("--data=4", "--model=2"),
            devices=8,
        )
    )
    assert "8 × cpu (platform cpu) in 1 process; mesh: data 4 × model 2" in printed
    assert "  data 3: cpu:6, cpu:7" in printed
    np.testing.assert_allclose(losses(path), alone, rtol=ROUNDING)


def test_two_processes_have_the_curve_of_one(alone, tmp_path):
    path, port = tmp_path / "curve.json", free_port()
    both = [
        start(
            *(SCRIPT, *TINY, "--model=2", f"--steps={STEPS}", "--loss-json", path),
            *(f"--coordinator=localhost:{port}", "--processes=2", f"--process={process}"),
            devices=2,
        )
        for process in (0, 1)
    ]
    first, second = finish(*both)
    assert "4 × cpu (platform cpu) in 2 processes; mesh: data 2 × model 2" in first
    assert "mesh" not in second  # Gloo speaks in both processes, the example in the first.
    assert "training" not in second
    np.testing.assert_allclose(losses(path), alone, rtol=ROUNDING)


def test_a_killed_run_goes_on_where_it_was(alone, tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # pytest shows it where the test fails
    chance = random.Random(seed)
    path = tmp_path / "curve.json"
    run = (*TINY, f"--steps={STEPS}", f"--checkpoint={tmp_path / 'run'}", "--save-every=3")
    # First before there is any state to save, then twice wherever it happens to be: computing,
    # saving, or deleting an old state.
    for at, stop, seconds in (
        (1, 2, 0),
        (chance.randint(4, 20), 25, chance.uniform(0, 0.3)),
        (chance.randint(26, 45), STEPS, chance.uniform(0, 0.3)),
    ):
        print(f"killed {seconds:.3f} s after step {at} began")
        killed = start("-c", KILLED, at, stop, seconds, *run)
        _, errors = killed.communicate(timeout=120)
        assert killed.returncode == -signal.SIGKILL, errors
    (printed,) = finish(start(SCRIPT, *run, "--loss-json", path))
    print(printed)
    resumed = int(printed.split("resumed after step ")[1].split()[0])
    # The last kill was at step 26 at the earliest, when 24 may not have been written yet.
    assert 21 <= resumed < STEPS
    # The same sums in the same order.
    np.testing.assert_allclose(losses(path), alone, rtol=1e-7)
    left = sorted(each.name for each in (tmp_path / "run" / "states").iterdir() if each.is_dir())
    assert left == ["48", "50"], "the states before, and what kills left, are deleted"


def test_a_run_goes_on_on_another_mesh(alone, tmp_path):
    path = tmp_path / "curve.json"
    run = (SCRIPT, *TINY, f"--checkpoint={tmp_path / 'run'}")
    finish(start(*run, "--steps=5", "--model=2", devices=4))
    (printed,) = finish(start(*run, "--steps=10", "--loss-json", path))
    assert "resumed after step 5" in printed
    np.testing.assert_allclose(losses(path, 10), alone[:10], rtol=ROUNDING)


# The errors; the mesh is that of the devices that the tests run on.

DEVICES = jax.device_count()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--batch=0", "--batch is 0, needed at least 1"),
        ("--save-every=0", "--save-every is 0, needed at least 1"),
        ("--seed=-1", "--seed is -1, needed at least 0"),
        ("--width=36 --heads=4", "--width is 36, needed a multiple of 8: --heads 4"),
        ("--processes=2", "--processes is 2, which needs --coordinator HOST:PORT and --process"),
        (
            "--processes=2 --coordinator=localhost:1 --process=2",
            "--process is 2, needed 0 to 1 for --processes 2",
        ),
    ],
)
def test_options_that_do_not_fit_one_another(arguments, said, capsys):
    with pytest.raises(SystemExit):
        train_sharded.parse(arguments.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            f"--data={2 * DEVICES} --model=3",
            f"--data {2 * DEVICES} × --model 3 needs {6 * DEVICES} devices, JAX has {DEVICES}",
        ),
        (
            f"--model={DEVICES + 1}",
            f"--data 1 × --model {DEVICES + 1} needs {DEVICES + 1} devices, JAX has {DEVICES}",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(arguments, said):
    with pytest.raises(train_sharded.UsageError) as error:
        train_sharded.make_mesh(train_sharded.parse(arguments.split()))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--data=4 --batch=6", "--batch is 6, needed a multiple of --data, which is 4"),
        ("--model=4 --heads=2", "--heads is 2, needed a multiple of --model, which is 4"),
        (
            "--model=3 --heads=3 --width=48",
            "the number of logits is 256, needed a multiple of --model, which is 3",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_the_model(arguments, said, monkeypatch):
    options = train_sharded.parse(arguments.split())
    devices = (options.data or 1) * options.model
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    with pytest.raises(train_sharded.UsageError) as error:
        train_sharded.make_mesh(options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--learning-rate=1", "--learning-rate is 1.0, needed 0.003 to go on with the run in run"),
        ("--rank=3 --steps=9", "--rank is 3, needed 8 to go on with the run in run"),
    ],
)
def test_a_run_with_other_settings_does_not_go_on(arguments, said):
    text = np.zeros(3, np.uint8)
    before = train_sharded.settings(train_sharded.parse([]), text)
    chosen = train_sharded.settings(train_sharded.parse(arguments.split()), text)
    with pytest.raises(train_sharded.UsageError) as error:
        train_sharded.check_same_run(chosen, before, Path("run"))
    assert said in str(error.value)
    # How long, on what and how it is run may change.
    same = train_sharded.parse(["--steps=9", "--data=3", "--save-every=2"])
    train_sharded.check_same_run(train_sharded.settings(same, text), before, Path("run"))
    with pytest.raises(train_sharded.UsageError, match="the text is Python"):
        other = train_sharded.settings(same, np.ones(3, np.uint8))
        train_sharded.check_same_run(other, before, Path("run"))


def test_an_error_is_shown_without_a_traceback():
    done = start(SCRIPT, *TINY, "--data=3")
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 1
    assert errors.strip() == (
        "train_sharded.py: --data 3 × --model 1 needs 3 devices, JAX has 1; "
        "XLA_FLAGS=--xla_force_host_platform_device_count=3 makes them"
    )
