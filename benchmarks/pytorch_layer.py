"""One decoded token through LoRA layers: this project against PyTorch, on the CPU.

The same chain in both: 1×2048→2048 layers of rank 8, each with its own weights, in float32 and
bfloat16. PyTorch runs what PEFT runs, eagerly: `linear(x, w) + s * linear(linear(x, a), b)`. The
two are best installed apart, so they cannot take turns call by call. They do process by process:
JAX in a fresh one each turn, while PyTorch's threads sleep.

Only an idle machine gives figures for PyTorch: its OpenMP threads meet after every product, and
where others compete for the processors a layer waits for the scheduler, ten times its own time.

    python -m venv torch-venv && torch-venv/bin/pip install torch
    torch-venv/bin/python benchmarks/pytorch_layer.py --jax-python PYTHON_WITH_JAX_FUSED_LORA
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

WIDTH, RANK, SCALING = 2048, 8, 2.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Weights = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def jax_turn(python: str, seconds: float) -> tuple[str, dict[str, dict[str, Any]]]:
    """Runs our bench in a process; returns what native code it has, and its row for each dtype."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [python, "-m", "jax_fused_lora", "bench", "--op", "lora_linear"]
        command += ["--rows", "1", "--in", str(WIDTH), "--rank", str(RANK), "--dtype", *DTYPES]
        command += ["--seconds", str(seconds), "--json", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads(file.read_text(encoding="utf-8"))
    native = report["machine"]["implementations"]["cpu"]["reason"]
    return native, {row["case"]["dtype"]: row for row in report["rows"]}


def make_weights(layers: int, dtype: torch.dtype) -> Weights:
    """Random W, A and B of each layer, in `torch.nn.Linear`'s layout, (out, in)."""

    def normal(n: int, k: int, scale: float = 1.0) -> torch.Tensor:
        values: torch.Tensor = torch.randn(n, k) * scale / k**0.5
        return values.to(dtype)

    # As in this project's bench: the low-rank part is small enough for the chain to stay finite.
    return [
        (normal(WIDTH, WIDTH), normal(RANK, WIDTH), normal(WIDTH, RANK, 1 / (8 * SCALING)))
        for _ in range(layers)
    ]


@torch.no_grad()
def torch_turn(x: torch.Tensor, weights: Weights, seconds: float) -> float:
    """Returns the median time of a layer, in microseconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 7 or time.perf_counter() < end:
        start = time.perf_counter()
        y = x
        for w, a, b in weights:
            y = linear(y, w) + SCALING * linear(linear(y, a), b)
        times.append(time.perf_counter() - start)
    if not y.isfinite().all():
        raise RuntimeError("PyTorch's result is not finite")
    return median(times) * 1e6 / len(weights)


def main() -> None:
    """Takes turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--jax-python", default=sys.executable, help="an interpreter with jax_fused_lora"
    )
    parser.add_argument("--threads", type=int, default=2, help="of both (default 2)")
    parser.add_argument("--turns", type=int, default=5, help="of each (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per turn and dtype (default 2)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    # XLA has no flag for its threads: it starts one for each processor that it may run on.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])

    weights: dict[str, Weights] = {}
    us: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in DTYPES}
    for _ in range(arguments.turns):
        native, rows = jax_turn(arguments.jax_python, arguments.seconds)
        for name, dtype in DTYPES.items():
            us[name]["ours"].append(rows[name]["ours_us"])
            us[name]["xla"].append(rows[name]["xla_us"])
            if name not in weights:
                weights[name] = make_weights(rows[name]["layers"], dtype)
            x = torch.randn(1, WIDTH).to(dtype)
            us[name]["torch"].append(torch_turn(x, weights[name], arguments.seconds))

    print(f"1×{WIDTH}→{WIDTH}, rank {RANK}, PyTorch {torch.__version__}, ", end="")
    print(f"{arguments.threads} threads; µs a layer, medians of {arguments.turns} turns (range)")
    print(f"jax_fused_lora's cpu: {native}")
    for name, sides in us.items():
        for side, title in (
            ("ours", "jax_fused_lora"),
            ("xla", "jitted XLA"),
            ("torch", "PyTorch"),
        ):
            low, middle, high = min(sides[side]), median(sides[side]), max(sides[side])
            print(f"{name:9} {title:15} {middle:8.1f} ({low:.1f}–{high:.1f})")
        print(f"{name:9} ours/PyTorch    {median(sides['ours']) / median(sides['torch']):8.2f}")


if __name__ == "__main__":
    main()
