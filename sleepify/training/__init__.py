"""Training a sleeping model: transformers' Trainer with Muon, collation, resuming and distribution."""

from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.data import SleepCollator, TaskDataset
from sleepify.training.optim import MuonAdamW, build_optimizer, split_parameters
from sleepify.training.trainer import NonFiniteStepsError, SleepTrainer

__all__ = [
    "MuonAdamW",
    "NonFiniteStepsError",
    "SleepCollator",
    "SleepTrainer",
    "SleepTrainingArguments",
    "TaskDataset",
    "build_optimizer",
    "split_parameters",
]
