"""Published recipes: options of a run by name."""

from __future__ import annotations

from typing import Any

# that of POCL's code (arXiv 2506.05695), whose reported jsd has the weight 0.1
PAPER: dict[str, Any] = {
    "stages": 4, "epochs_per_stage": 8, "temperature": [1.0, 1.33, 1.67, 2.0], "alpha": [0.3, 0.2, 0.1, 0.0],
    "temperature_scaling": "paper", "beta": 0.1, "learning_rate": 1e-4, "weight_decay": 0.01, "max_grad_norm": 1.0,
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_length": 512, "max_prompt_length": 256,
    "stage_weights": "best", "fresh_optimizer": True, "fresh_learning_rate": True, "curriculum": "pocl",
    "pacing": "baby-steps", "stage_length": "passes", "within_stage": "constant", "signals": "rouge_l,cross_entropy",
    "rrf_k": 60.0, "ties": "first",
}  # fmt: skip
PRESETS = {"paper": PAPER}
