"""Hugging Face file formats: PEFT adapters and checkpoints that are published whole or not at all."""

from .adapter import load_adapter, save_adapter
from .checkpoint import CheckpointError

__all__ = ["CheckpointError", "load_adapter", "save_adapter"]
