"""Curves of a run for TensorBoard and Weights & Biases: one point an epoch, also across resumes."""

from __future__ import annotations

import argparse
import uuid
from pathlib import Path
from typing import Any

_RUN_ID = "wandb_id.txt"


class Loggers:
    """The loggers that were asked for; imported at once, opened when the first epoch is known.

    Args:
        folder: of the run.
        args: options of the run.

    Raises:
        ImportError: a logger that is not installed.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self._board = self._wandb = None
        self._writer = _summary_writer() if args.log_tensorboard else None
        self._module = _wandb() if args.log_wandb else None

    def open(self, epoch: int) -> None:
        """Starts or goes on.

        Args:
            epoch: the next to be logged; what was logged of it and later ones, by a run that ended before its
                checkpoint, does not count any more.

        Raises:
            ValueError: Weights & Biases refuses the run.
        """
        if self._writer is not None:
            self._board = self._writer(str(self.folder / "tensorboard"), purge_step=epoch if self.args.resume else None)
        if self._module is not None:
            config = {key: value for key, value in vars(self.args).items() if key not in ("config", "resume")}
            try:
                self._wandb = self._module.init(
                    project=self.args.wandb_project, dir=str(self.folder), config=config, resume="allow",
                    id=self._run_id(), name=self.folder.name,
                )  # fmt: skip
            except self._module.Error as error:
                raise ValueError(
                    f"--log-wandb: no run could be started ({error}); log in with `wandb login`, or set "
                    "WANDB_MODE=offline and upload later with `wandb sync`"
                ) from error

    def _run_id(self) -> str:
        """The id in the folder, so that folders of one name are not one run."""
        path = self.folder / _RUN_ID
        if not (self.args.resume and path.is_file()):
            path.write_text(uuid.uuid4().hex[:12] + "\n")
        return path.read_text().strip()

    def log(self, row: dict[str, Any]) -> None:
        """The numbers of an epoch's row."""
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, row["epoch"])
            self._board.flush()
        if self._wandb is not None:  # without commit, a step waits for the next one; steps that it has are left out
            self._wandb.log(numbers, step=row["epoch"], commit=True)

    def close(self, failed: bool = False) -> None:
        """Ends what was opened.

        Args:
            failed: whether the run ended with an error.
        """
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
        self._board = self._wandb = None


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"--log-tensorboard needs tensorboard ({error}); pip install tensorboard") from error
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"--log-wandb needs wandb ({error}); pip install wandb") from error
    return wandb
