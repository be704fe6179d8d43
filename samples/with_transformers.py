"""Phases in a Hugging Face Trainer: a small GPT-2 on Python's own source, trained by one callback.

In several processes: ``accelerate launch --cpu --num_processes 2 samples/with_transformers.py``, or by ``torchrun``.
"""

from __future__ import annotations

import sys
import tempfile

import chars
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import dynrank_fx as dr
from dynrank_fx.integrations.transformers import PhasesCallback


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Pieces of the text, CONTEXT characters each, side by side."""

    def __init__(self, count: int) -> None:
        self.pieces = chars.text().unfold(0, chars.CONTEXT, chars.CONTEXT)[:count]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def net() -> torch.nn.Module:
    """GPT-2 of two layers, of its own class; every large matrix is a site."""
    config = GPT2Config(
        vocab_size=chars.CHARACTERS,
        n_positions=chars.CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = torch.randint(chars.CHARACTERS, (2, chars.CONTEXT))
    example = {"input_ids": tokens, "labels": tokens.clone()}
    return dr.transform(GPT2LMHeadModel(config), example, form=dr.Form.LAYERS, leave=tuple(dr.Role), exclude=["*wpe*"])


def main(epochs: int = 4, count: int = 2000) -> None:
    set_seed(0)
    callback = PhasesCallback(dr.schedules.auto(0.75))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(net(), arguments, train_dataset=Windows(count), callbacks=[callback])
        loss = trainer.train().training_loss
    if not trainer.is_world_process_zero():
        return
    for record in callback.history:
        spent = f"compute so far {record.spent:.2f} dense {record.unit}s"
        print(f"{record.unit} {record.epoch + 1:>2}  {record.phase:<12} {spent}")
    print(f"mean training loss {loss:.3f}")
    pieces = Windows(64)
    small = dr.truncate(trainer.model, [{name: ids[None] for name, ids in pieces[i].items()} for i in range(64)])
    print(f"{sum(p.numel() for p in small.parameters()):,} parameters after truncation")
    start = chars.text()[None, :16]
    line = small.eval().generate(
        start, max_length=chars.CONTEXT, do_sample=False, attention_mask=torch.ones_like(start)
    )
    print("it writes:", "".join(chr(code + 31) if code else "\n" for code in line[0].tolist()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
