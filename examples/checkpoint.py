"""The checkpoints of a LoRA training run, from which it goes on after having been killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.args import Composite, JsonRestore, JsonSave, StandardRestore, StandardSave

Curve = list[tuple[int, float]]
"""Each step's number, from 1, and its loss."""


class Checkpoint:
    """A directory with the frozen weights, saved once, and the latest two states of training.

    Orbax writes into a temporary directory and renames it, so a kill leaves either all of a
    checkpoint or none. That of step n has the adapters, the optimizer's state and the curve after n
    steps. The losses of later steps die with the process, so that none is in the curve twice when
    those steps are taken again.

    The frozen weights could be drawn from the seed again. They are saved because adapters are worth
    nothing without the very weights they were trained on, which another version of JAX, or another
    kind of device, may draw differently.
    """

    def __init__(self, directory: Path):
        self._base = _manager(directory.resolve() / "base")
        self._states = _manager(directory.resolve() / "states")

    def settings(self) -> dict[str, Any] | None:
        """What the run was begun with; None if it was not begun."""
        step = self._base.latest_step()
        if step is None:
            return None
        return self._base.restore(step, args=Composite(settings=JsonRestore())).settings

    def begin(self, frozen: Any, settings: dict[str, Any]) -> Any:
        """The frozen weights of the run: those given, which are saved, or those saved before.

        A run that was killed before its first checkpoint has saved no more than these.
        """
        if self._base.latest_step() is not None:
            return self._restore_base(frozen)
        self._base.save(0, args=Composite(frozen=StandardSave(frozen), settings=JsonSave(settings)))
        self._base.wait_until_finished()
        return frozen

    def save(self, state: Any, curve: Curve) -> None:
        """Save the state of training after the curve's last step; the writing goes on meanwhile."""
        args = Composite(state=StandardSave(state), curve=JsonSave({"curve": list(curve)}))
        self._states.save(curve[-1][0], args=args)

    def restore(self, frozen: Any, state: Any) -> tuple[Any, Any, Curve] | None:
        """The frozen weights, the latest state of training and the curve; None before the first.

        Args:
            frozen: the frozen weights' shapes, dtypes and shardings, whatever mesh saved them.
            state: the same of the state of training.
        """
        step = self._states.latest_step()
        if step is None:
            return None
        args = Composite(state=StandardRestore(state), curve=JsonRestore())
        found = self._states.restore(step, args=args)
        curve = [(number, loss) for number, loss in found.curve["curve"]]
        return self._restore_base(frozen), found.state, curve

    def close(self) -> None:
        """Wait until all is written."""
        self._states.close()
        self._base.close()

    def _restore_base(self, frozen: Any) -> Any:
        return self._base.restore(0, args=Composite(frozen=StandardRestore(frozen))).frozen


def _manager(directory: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(2),
            cleanup_tmp_directories=True,  # Left behind by a run that was killed.
        ),
    )
