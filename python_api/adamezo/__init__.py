"""Fine-tune language models with forward passes only: Adam-style steps, no stored moments."""

from .methods import AdaMeZO
from .step import fused_adamezo_step

__all__ = ["AdaMeZO", "fused_adamezo_step"]
