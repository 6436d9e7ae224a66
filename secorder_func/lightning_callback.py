"""A callback that tracks curvature in a training by Lightning; needs the extra `lightning`."""

from __future__ import annotations

from typing import Any

from secorder_func.errors import ArgumentTypeError, MissingExtraError, message
from secorder_func.tracker import CurvatureTracker

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as error:
    raise MissingExtraError("secorder_func.lightning_callback", "lightning", "lightning") from error

__all__ = ["CurvatureCallback"]


class CurvatureCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Steps a `CurvatureTracker` after every step of the optimizer, and logs what it records.

    Parameters
    ----------
    tracker
        Made with the module that is trained, or the model within it. Over several processes give it
        `Batches(..., group=True)`, made in the module's `on_fit_start`, when they are there.

    Notes
    -----
    With gradient accumulation a step is one of the optimizer. Numbers go to the trainer's loggers by the names
    `curvature/loss`, `curvature/trace`, `curvature/eigenvalue`, `curvature/form` and `curvature/share`. Checkpoints of
    the trainer hold the tracker's state.
    """

    def __init__(self, tracker: CurvatureTracker) -> None:
        given: Any = tracker
        if not isinstance(given, CurvatureTracker):
            problem = f"tracker must be a CurvatureTracker, got {type(given).__name__}"
            raise ArgumentTypeError(message("CurvatureCallback", problem))
        self.tracker = tracker
        self._steps = 0

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Step the tracker, if the optimizer has made a step."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        record = self.tracker.step(step=self._steps - 1)
        if record is None:
            return
        top = record.eigenvalues[0] if record.eigenvalues else None
        numbers = {
            "loss": record.loss,
            "trace": record.trace,
            "eigenvalue": top,
            "form": record.form,
            "share": record.share,
        }
        known = {f"curvature/{name}": x for name, x in numbers.items() if x is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=record.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tracker."""
        return {"tracker": self.tracker.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.tracker.load_state_dict(state_dict["tracker"])
        self._steps = state_dict["steps"]
