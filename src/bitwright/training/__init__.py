"""Training: fine-tuning of quantized networks, and of float ones before them."""

from bitwright.training.finetune import FinetuneOptions, History, finetune

__all__ = ["FinetuneOptions", "History", "finetune"]
