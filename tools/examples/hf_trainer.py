"""Hugging Face's Trainer: it asks a factory for the optimizer, so it needs no subclass.

    python -m tools.examples.hf_trainer --steps 10
    torchrun --nproc-per-node 2 -m tools.examples.hf_trainer --steps 10           # data-parallel: the same losses
    torchrun --nproc-per-node 2 -m tools.examples.hf_trainer --steps 10 --fsdp    # FSDP2, by accelerate, on CUDA
    python -m tools.examples.hf_trainer --steps 10 --output runs --save-steps 5; python -m tools.examples.hf_trainer \
        --steps 10 --output runs --resume runs/checkpoint-5
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig

from .common import GLOBAL_BATCH, SEQ_LENGTH, VOCAB_SIZE, arguments, leave, samples


class Text(Dataset[dict[str, Tensor]]):
    """Training sequences as the Trainer wants them."""

    def __init__(self, data_path: list[str]) -> None:
        self.samples = samples(data_path)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        tokens = self.samples.batch(i, 1)[0]
        return {"input_ids": tokens, "labels": tokens}  # the model shifts them itself


def factory() -> Callable[..., Optimizer]:
    """What the Trainer calls with the model and the settings given beside it."""

    def build(model: nn.Module, **settings: Any) -> Optimizer:
        return get_optimizer(OptimizerConfig.from_dict(settings), model)

    return build


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print the losses."""
    parser = arguments("hf_trainer", "Train a small Llama with Hugging Face's Trainer.")
    parser.add_argument("--fsdp", action="store_true", help="shard the model with FSDP2")
    parser.add_argument("--output", help="directory for checkpoints; none are kept by default")
    parser.add_argument("--save-steps", type=int, default=0, help="save after every so many steps")
    parser.add_argument("--resume", help="checkpoint to go on from")
    args = parser.parse_args(argv)
    if args.fsdp and not torch.cuda.is_available():
        parser.error(
            "--fsdp: on a CPU accelerate replicates the model without a word; use CUDA, or tools.examples.fsdp2."
        )

    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=SEQ_LENGTH + 1, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = Trainer(
            model,
            TrainingArguments(
                args.output or nowhere, max_steps=args.steps, use_cpu=not torch.cuda.is_available(), report_to="none",
                per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", 1)), max_grad_norm=1.0,
                lr_scheduler_type="cosine", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, seed=0,
                save_strategy="steps" if args.save_steps else "no", save_steps=args.save_steps or 1,
                fsdp=args.fsdp, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
            ),
            train_dataset=Text(args.data_path),
            optimizer_cls_and_kwargs=(
                factory, {"optimizer": args.optimizer, "lr": args.lr, "muon_fp32_matmul_prec": args.precision}
            ),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history:
            if "loss" in entry:
                print(f"step {entry['step']} loss {entry['loss']:.7f}", flush=True)
    leave()


if __name__ == "__main__":
    main()
