"""Lightning: the optimizer and its schedule out of ``configure_optimizers``.

python -m tools.examples.lightning_module
torchrun --nproc-per-node 2 -m tools.examples.lightning_module                # data-parallel: the same losses
python -m tools.examples.lightning_module --steps 5 --save half.ckpt
python -m tools.examples.lightning_module --steps 10 --resume half.ckpt
"""

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig

from ..pretrain.model import build_gpt
from .common import GLOBAL_BATCH, arguments, gpt_config, leave, report, samples


class Text(Dataset[Tensor]):
    """Training sequences, each (SEQ_LENGTH + 1,)."""

    def __init__(self, data_path: list[str]) -> None:
        self.samples = samples(data_path)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Tensor:
        return self.samples.batch(i, 1)[0]


class Language(lightning.LightningModule):
    """A small GPT that knows how it is trained."""

    def __init__(self, config: OptimizerConfig, schedule_steps: int) -> None:
        super().__init__()
        self.model = build_gpt(gpt_config(tied=True), seed=0)
        self.config, self.schedule_steps = config, schedule_steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of this rank's part of the batch."""
        loss = F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        report(self.global_step + 1, loss)
        return loss

    def configure_optimizers(self) -> Any:
        """What Lightning trains with; it clips, steps with a closure, and saves both."""
        optimizer = get_optimizer(self.config, self)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.schedule_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print the losses."""
    parser = arguments("lightning_module", "Train a small GPT with Lightning.")
    parser.add_argument("--schedule-steps", type=int, default=10, help="length of the cosine")
    parser.add_argument("--save", help="file for a checkpoint after the last step")
    parser.add_argument("--resume", help="file to go on from")
    args = parser.parse_args(argv)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config = OptimizerConfig(optimizer=args.optimizer, lr=args.lr, muon_fp32_matmul_prec=args.precision)
    trainer = lightning.Trainer(
        devices=processes, strategy="ddp" if processes > 1 else "auto", max_steps=args.steps, gradient_clip_val=1.0,
        plugins=[] if processes > 1 else [LightningEnvironment()],  # without torchrun it would start MPI, where that is installed
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,  # it would shuffle
    )  # fmt: skip
    # Lightning brings back the optimizer, not the place in the data.
    done = torch.load(args.resume, weights_only=True)["global_step"] if args.resume else 0
    text = Text(args.data_path)
    rest = Subset(text, range(done * GLOBAL_BATCH + rank, len(text), processes))
    loader = DataLoader(rest, batch_size=GLOBAL_BATCH // processes)
    trainer.fit(Language(config, args.schedule_steps), loader, ckpt_path=args.resume)
    if args.save:
        trainer.save_checkpoint(args.save)
    leave()


if __name__ == "__main__":
    main()
