"""Batches of text that every Python has at hand, fed by each process to its own devices."""

from __future__ import annotations

import dataclasses
import sys
import sysconfig
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def read_text() -> np.ndarray:
    """The sources of the standard library's single-file modules, one after the other, as bytes.

    Raises:
        RuntimeError: this Python comes without them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    # Not the modules that describe this one machine, which start with an underscore.
    paths = [
        path for path in sorted(library.glob("[a-z]*.py")) if path.stem in sys.stdlib_module_names
    ]
    if len(paths) < 50:
        raise RuntimeError(f"{library} has {len(paths)} modules as .py files, needed at least 50")
    return np.frombuffer(b"\n".join(path.read_bytes() for path in paths), np.uint8)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Random pieces of a text. A batch is a function of seed and step, and of nothing else.

    So a resumed run needs no position in the data: step n gets the batch that it would have got.
    """

    text: np.ndarray
    seed: int
    batch: int
    sequence: int
    mesh: Mesh

    @property
    def sharding(self) -> NamedSharding:
        """Rows split over "data", and each whole on all devices along "model"."""
        return NamedSharding(self.mesh, P("data"))

    @property
    def shape(self) -> tuple[int, int]:
        """Of the global batch. A piece is a byte longer than a sequence, to be shifted by one."""
        return self.batch, self.sequence + 1

    @property
    def layout(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of the global batch."""
        return jax.ShapeDtypeStruct(self.shape, np.uint8, sharding=self.sharding)

    def own_rows(self) -> list[int]:
        """The rows of the batch that lie on this process's devices."""
        rows: set[int] = set()
        for index in self.sharding.addressable_devices_indices_map(self.shape).values():
            assert index is not None  # None is for no device of this process
            rows.update(range(*index[0].indices(self.batch)))
        return sorted(rows)

    def __call__(self, step: int) -> jax.Array:
        """The global batch of a step, of which this process reads and feeds its own rows."""
        starts = np.random.default_rng((self.seed, step)).integers(
            len(self.text) - self.sequence, size=self.batch
        )
        rows = starts[self.own_rows(), None] + np.arange(self.shape[1])
        return jax.make_array_from_process_local_data(self.sharding, self.text[rows], self.shape)
