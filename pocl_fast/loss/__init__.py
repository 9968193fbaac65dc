"""The fused distillation losses over tensors.

Knows the kernels, but no model and no sample."""
