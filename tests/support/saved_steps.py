"""A directory with the checkpoints of three steps, and the test that one of them was loaded entirely."""

from pathlib import Path

import torch
from torch import nn

from core.checkpoint import load, save
from core.optimizer.rules.adam import AdamW
from tests.support.small_run import noise

STEPS = (1, 2, 3)
NEWEST = "iter_0000003"


class Saved:
    """A run that saved three checkpoints to ``directory``. Every entry of a checkpoint tells its step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        self.optimizer = AdamW(self.net.parameters())
        for step in STEPS:
            self.save(step)

    def save(self, step: int, **kwargs: object) -> Path:
        self._fill(step)
        return save(self.directory, step=step, model_chunks=[self.net], optimizer=self.optimizer, **kwargs)

    def load(self, directory: Path | None = None, **kwargs: object) -> int:
        """Step that was loaded. Fails unless every entry is of that step."""
        self._fill(0)
        loaded = load(directory or self.directory, model_chunks=[self.net], optimizer=self.optimizer, **kwargs)
        loaded_values = [x.clone() for x in self._tensors()]
        self._fill(loaded.step)
        assert all(torch.equal(x, y) for x, y in zip(loaded_values, self._tensors(), strict=True))
        return loaded.step

    def _tensors(self) -> list[torch.Tensor]:
        parameters = list(self.net.parameters())
        state = [self.optimizer.state[p][slot] for p in parameters for slot in ("exp_avg", "exp_avg_sq")]
        return [p.data for p in parameters] + state

    def _fill(self, step: int) -> None:
        for i, x in enumerate(self._tensors()):
            x.copy_(noise(f"{step} {i}", x.shape))
