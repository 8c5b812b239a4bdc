"""Fine-tune a small language model with LoRA on a mesh of devices, data by model parallel.

The model reads and writes bytes; the text is the running Python's own standard library. Its frozen
weights are random, which any checkpoint could replace; the adapters of all linear layers are what
is trained. After `pip install '.[flax]' -r examples/requirements.txt` the same file runs

on one device:
    python examples/train_sharded.py

on eight CPU devices, which XLA makes of one processor:
    export XLA_FLAGS=--xla_force_host_platform_device_count=8
    python examples/train_sharded.py --data 4 --model 2

in two processes, each of them fed its own part of every batch; in two shells, with --process 0
and --process 1:
    python examples/train_sharded.py --coordinator localhost:7733 --processes 2 --process 0

on two GPUs, split one way or the other:
    python examples/train_sharded.py --data 2
    python examples/train_sharded.py --model 2

Loss and weights do not depend on the way, up to the rounding of sums taken in another order. With
--checkpoint DIR a run that is killed goes on where it was when it is started again, on the same
mesh or another. Where one of several processes dies, JAX ends the others within two minutes; all
are then to be started again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from checkpoint import Checkpoint, Curve
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from library_text import Batches, read_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sharded_step import Program, compile_program
from transformer import BYTES, TransformerConfig

import jax_fused_lora


class UsageError(Exception):
    """What a person can put right: shown without a traceback."""


# ---- The command line.


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, env, sizes = parser.add_argument, os.environ.get, TransformerConfig
    add("--steps", type=int, default=200, help="training steps, those of earlier runs included")
    add("--batch", type=int, default=16, help="sequences per step, over all devices")
    add("--sequence", type=int, default=128, help="bytes per sequence")
    add("--layers", type=int, default=sizes.layers, help="of the model")
    add("--width", type=int, default=sizes.width, help="of the model")
    add("--heads", type=int, default=sizes.heads, help="of attention")
    add("--rank", type=int, default=sizes.rank, help="of the adapters")
    add("--alpha", type=float, default=sizes.alpha, help="adapters are scaled by alpha / rank")
    add("--learning-rate", type=float, default=3e-3, help="after warming up")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--implementation", choices=jax_fused_lora.implementations(), help="default: the best")
    mesh = parser.add_argument_group("mesh")
    mesh.add_argument("--data", type=int, help="parts of the batch; default: devices / --model")
    mesh.add_argument("--model", type=int, default=1, help="parts of each layer")
    processes = parser.add_argument_group("several processes")
    add = processes.add_argument
    add("--coordinator", metavar="HOST:PORT", default=env("JAX_COORDINATOR_ADDRESS"),
        help="where process 0 listens; or JAX_COORDINATOR_ADDRESS")  # fmt: skip
    add("--processes", type=int, default=env("JAX_NUM_PROCESSES", "1"),
        help="how many there are; or JAX_NUM_PROCESSES")  # fmt: skip
    add("--process", type=int, default=env("JAX_PROCESS_ID"),
        help="which one this is, from 0; or JAX_PROCESS_ID")  # fmt: skip
    results = parser.add_argument_group("results")
    add = results.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="resume from here and save here; seen by "
        "all processes")  # fmt: skip
    add("--save-every", type=int, default=50, metavar="N", help="steps between checkpoints")
    add("--loss-json", type=Path, metavar="FILE", help="write [[step, loss], …] here at the end")
    options = parser.parse_args(arguments)

    for name in ("steps", "batch", "sequence", "layers", "width", "heads", "rank", "model",
                 "processes", "save_every", "data"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, needed at least 1")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}, needed at least 0")
    if options.width % (2 * options.heads):
        parser.error(
            f"--width is {options.width}, needed a multiple of {2 * options.heads}: --heads "
            f"{options.heads} of an even number of features each"
        )
    if options.processes > 1:
        if options.coordinator is None or options.process is None:
            parser.error(f"--processes is {options.processes}, which needs --coordinator HOST:PORT "
                         "and --process too")  # fmt: skip
        if not 0 <= options.process < options.processes:
            parser.error(f"--process is {options.process}, needed 0 to {options.processes - 1} for "
                         f"--processes {options.processes}")  # fmt: skip
    return options


def settings(options: argparse.Namespace, text: np.ndarray) -> dict[str, Any]:
    """All that the loss curve depends on; mesh, processes and number of steps are not among it."""
    names = ("batch", "sequence", "layers", "width", "heads", "rank", "alpha", "learning_rate",
             "seed")  # fmt: skip
    digest = hashlib.sha256(text.tobytes()).hexdigest()[:16]
    return {name: getattr(options, name) for name in names} | {
        "text": f"Python {platform.python_version()}, {digest}"
    }


# ---- The mesh, and what lies where.


def make_mesh(options: argparse.Namespace) -> Mesh:
    """The mesh that the options ask for.

    Raises:
        UsageError: it does not fit the devices, the batch or the model.
    """
    model, devices = options.model, jax.device_count()
    data = options.data if options.data is not None else max(1, devices // model)
    if data * model != devices:
        hint = ""
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            hint = f"; XLA_FLAGS=--xla_force_host_platform_device_count={data * model} makes them"
        raise UsageError(
            f"--data {data} × --model {model} needs {data * model} devices, JAX has {devices}{hint}"
        )
    for name, value, parts, option in (
        ("--batch", options.batch, data, "--data"),
        ("--heads", options.heads, model, "--model"),
        ("the number of logits", BYTES, model, "--model"),
    ):
        if value % parts:
            raise UsageError(f"{name} is {value}, needed a multiple of {option}, which is {parts}")
    # Auto: XLA propagates the shardings of parameters and batch through the program.
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def check_processes_agree(options: argparse.Namespace, text: str) -> None:
    """Raise UsageError where processes have other options: they would wait for one another."""
    mine = vars(options) | {"text": text}
    for own in ("process", "coordinator", "loss_json"):
        del mine[own]
    said = ", ".join(f"{name} {value}" for name, value in sorted(mine.items()))
    digest = np.frombuffer(hashlib.sha256(said.encode()).digest(), np.uint8)
    everyone = multihost_utils.process_allgather(digest).reshape(-1, len(digest))
    for process, other in enumerate(everyone):
        if (other != everyone[0]).any():
            raise UsageError(
                f"process {process} has other options or another Python than process 0, needed "
                f"the same; process {jax.process_index()} has {said}"
            )


def check_same_run(chosen: dict[str, Any], before: dict[str, Any], directory: Path) -> None:
    """Raise UsageError where the run that made a checkpoint had other settings."""
    for name, value in before.items():
        if chosen[name] != value:
            option = "the text" if name == "text" else f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} is {chosen[name]}, needed {value} to go on with the run in {directory}; "
                "to begin another give another --checkpoint"
            )


# ---- Training.


def model_config(options: argparse.Namespace) -> TransformerConfig:
    """The model that the options ask for."""
    names = (field.name for field in dataclasses.fields(TransformerConfig))
    return TransformerConfig(**{name: getattr(options, name) for name in names})


def optimizer(learning_rate: float) -> optax.GradientTransformation:
    """AdamW that warms up over ten steps and then goes on at one rate.

    It does not depend on how many steps there will be, so a finished run can be taken further.
    """
    schedule = optax.linear_schedule(0.0, learning_rate, 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def describe(mesh: Mesh, program: Program, console: Console) -> None:
    """Print what runs where."""
    kinds = collections.Counter(device.device_kind for device in mesh.devices.flat)
    devices = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    console.print(
        f"{devices} (platform {jax.default_backend()}) in {jax.process_count()} "
        f"process{'es' if jax.process_count() > 1 else ''}; mesh: "
        + " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    )
    for index, row in enumerate(mesh.devices):
        console.print(f"  data {index}: {', '.join(map(str, row))}")
    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (program.state["trained"], program.frozen)
    )
    console.print(f"{trained:,} parameters are trained, {frozen:,} frozen")


def fine_tune(options: argparse.Namespace, console: Console) -> Curve:
    """Train as the options say; return the whole curve, steps of earlier runs included.

    Raises:
        UsageError: options do not fit the devices, the other processes or the checkpoint.
    """
    text = read_text()
    chosen = settings(options, text)
    check_processes_agree(options, chosen["text"])
    if options.sequence >= len(text):
        raise UsageError(
            f"--sequence is {options.sequence}, needed less than {len(text)}: the text"
        )
    mesh = make_mesh(options)
    batches = Batches(text, options.seed, options.batch, options.sequence, mesh)
    checkpoint = Checkpoint(options.checkpoint) if options.checkpoint else None
    before = checkpoint.settings() if checkpoint else None
    if before:
        check_same_run(chosen, before, options.checkpoint)

    with jax.set_mesh(mesh):
        began = time.perf_counter()
        program = compile_program(
            model_config(options),
            optimizer(options.learning_rate),
            batches.layout,
            seed=options.seed,
            mesh=mesh,
        )
        describe(mesh, program, console)
        console.print(f"the training step was compiled in {time.perf_counter() - began:.1f} s")
        restored = checkpoint.restore(program.frozen, program.state) if checkpoint else None
        if restored:
            frozen, state, curve = restored
            console.print(f"resumed after step {len(curve)} from {options.checkpoint}")
            if len(curve) >= options.steps:
                console.print(f"nothing to do: --steps is {options.steps}")
        else:
            (frozen, state), curve = program.start(), []
            if checkpoint:
                frozen = checkpoint.begin(frozen, chosen)

        def save(state: Any) -> None:
            if checkpoint:
                checkpoint.save(state, curve)

        train(options, program, frozen, state, batches, curve, save, console)
    if checkpoint:
        checkpoint.close()
    return curve


def train(
    options: argparse.Namespace,
    program: Program,
    frozen: Any,
    state: Any,
    batches: Batches,
    curve: Curve,
    save: Callable[[Any], None],
    console: Console,
) -> None:
    """Train to step --steps behind a progress bar, adding to the curve."""
    waiting: list[tuple[int, jax.Array]] = []
    first, began = len(curve), time.perf_counter()
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} tokens/s, loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        last = curve[-1][1] if curve else np.nan
        task = progress.add_task("", total=options.steps, completed=first, rate=0.0, loss=last)

        def collect() -> None:
            curve.extend((number, float(loss)) for number, loss in waiting)
            waiting.clear()
            tokens = (len(curve) - first) * options.batch * options.sequence
            rate = tokens / (time.perf_counter() - began)
            last = curve[-1][1] if curve else np.nan
            progress.update(task, completed=len(curve), rate=rate, loss=last)

        for number in range(first + 1, options.steps + 1):
            state, loss = program.step(state, frozen, batches(number))
            # Waits for the loss of the step before, so that the devices always have work.
            collect()
            waiting.append((number, loss))
            if number == options.steps or number % options.save_every == 0:
                collect()
                save(state)


def write_atomically(path: Path, content: str) -> None:
    """Write a file that, whatever happens, has all of `content` or stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    options = parse(arguments)
    if options.processes > 1:
        # For GPUs, XLA has NCCL; it is for CPUs that there is a choice.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    console = Console(quiet=jax.process_index() != 0, highlight=False)
    try:
        curve = fine_tune(options, console)
    except UsageError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    if curve:
        console.print(
            f"loss {curve[0][1]:.4f} at step 1, {curve[-1][1]:.4f} at step {curve[-1][0]}"
        )
    if options.loss_json and jax.process_index() == 0:
        write_atomically(options.loss_json, json.dumps(curve))


if __name__ == "__main__":
    main()
