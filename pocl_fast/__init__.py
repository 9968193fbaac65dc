"""pocl-fast: fused distillation losses and the POCL curriculum for language models."""

__version__ = "0.1.0"
