"""`nf4lora finetune` under torchrun; fails where a process ends before all is saved, or DDP after the process group: it may hang."""

import gc
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from nf4lora.cli import app

destroy = torch.distributed.destroy_process_group


def watched(group=None):
    assert not any(issubclass(type(found), DistributedDataParallel) for found in gc.get_objects())
    assert Path(sys.argv[sys.argv.index("--output") + 1], "loss.png").exists()
    destroy(group)


if __name__ == "__main__":
    torch.distributed.destroy_process_group = watched
    sys.exit(app.run())
