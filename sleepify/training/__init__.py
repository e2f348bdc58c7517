"""Training a sleeping model: transformers' Trainer with Muon, collation, resuming and distribution."""

from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.data import SleepCollator, TaskDataset
from sleepify.training.optim import MuonAdamW, build_optimizer, split_parameters
from sleepify.training.text_data import DatasetArguments, TextData, TextRows, load_text
from sleepify.training.text_evaluate import evaluate_text
from sleepify.training.text_format import DatasetError
from sleepify.training.trainer import NonFiniteStepsError, SleepTrainer

__all__ = [
    "DatasetArguments",
    "DatasetError",
    "MuonAdamW",
    "NonFiniteStepsError",
    "SleepCollator",
    "SleepTrainer",
    "SleepTrainingArguments",
    "TaskDataset",
    "TextData",
    "TextRows",
    "build_optimizer",
    "evaluate_text",
    "load_text",
    "split_parameters",
]
