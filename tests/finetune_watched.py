"""`nf4lora finetune` under torchrun; fails where DDP outlives the process group, which may hang the process."""

import gc
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from nf4lora.cli import app

destroy = torch.distributed.destroy_process_group


def watched(group=None):
    assert not any(issubclass(type(found), DistributedDataParallel) for found in gc.get_objects())
    destroy(group)


if __name__ == "__main__":
    torch.distributed.destroy_process_group = watched
    sys.exit(app.run())
