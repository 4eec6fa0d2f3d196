"""What the ranks of test_train_moe_faults.py run: one of them is killed in the middle of a step."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import train_moe_job
from train_moe_job import SAVE_AT, STEPS

from examples.train_moe import checkpoint
from examples.train_moe.faults import FAULTS, leave
from examples.train_moe.train import Trainer

LOST = 3


def killed(out: str, where: str, parallel: dict[str, Any]) -> None:
    """A checkpoint in the background, one more step, and rank LOST goes in the next: in its experts, or when the
    others sum gradients."""
    ranks = train_moe_job.connect()
    try:
        with train_moe_job.make_trainer(ranks, **parallel) as trainer:
            list(trainer.train(SAVE_AT))
            saver = checkpoint.BackgroundSaver()
            saver.start(trainer, Path(out) / "checkpoints")
            list(trainer.train(SAVE_AT + 1))
            saver.wait()
            if ranks.rank == LOST:
                _go_at(trainer, where)
            list(trainer.train(STEPS))
    except FAULTS as fault:
        print(json.dumps({"type": type(fault).__name__, "peer": getattr(fault, "peer", None), "at": time.time()}))
        leave(ranks.rank, fault)


def _go_at(trainer: Trainer, where: str) -> None:
    def go(*_: object) -> None:
        print(json.dumps({"at": time.time()}), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "experts":
        layer = trainer.model.moe_layers()[0]
        layer.experts.register_forward_pre_hook(go)
    else:
        trainer._reduce_and_clip = go
