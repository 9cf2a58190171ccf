"""`nf4lora finetune` under torchrun as accelerate shards it with `fsdp_version: 2`, which there takes a GPU to be switched on."""

import sys

from accelerate import DistributedType, FullyShardedDataParallelPlugin

from nf4lora.cli import app, processes


class Sharded(processes.Several):
    def __init__(self) -> None:
        super().__init__()
        state = self._accelerator.state
        state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            reshard_after_forward=True,
        )  # fmt: skip
        state._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    processes.Several = Sharded
    sys.exit(app.run())
