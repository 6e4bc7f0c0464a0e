"""What every trainer shares: optimizers, checkpoints, metrics and the supervised loop. Knows nothing of PaLM."""

from palm_rlhf_pytorch.training.atomic import replacing
from palm_rlhf_pytorch.training.checkpoint import Checkpoint, Checkpoints, load_checkpoint, save_checkpoint
from palm_rlhf_pytorch.training.metrics import GLOSSARY, MetricsLog, RunningMean, read_metrics
from palm_rlhf_pytorch.training.optimizer import (
    adamw,
    linear_to_zero,
    parameter_groups,
    scale_learning_rates,
    warmup_cosine,
)
from palm_rlhf_pytorch.training.saves import Saves
from palm_rlhf_pytorch.training.supervised import fit
from palm_rlhf_pytorch.training.tensor_file import TensorFile, check_state, load_tensors, save_tensors

__all__ = [
    "GLOSSARY",
    "Checkpoint",
    "Checkpoints",
    "TensorFile",
    "MetricsLog",
    "RunningMean",
    "Saves",
    "adamw",
    "check_state",
    "fit",
    "linear_to_zero",
    "load_checkpoint",
    "load_tensors",
    "parameter_groups",
    "read_metrics",
    "replacing",
    "save_checkpoint",
    "save_tensors",
    "scale_learning_rates",
    "warmup_cosine",
]
