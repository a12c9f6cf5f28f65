"""The plan of a training whose images, models and libraries need not be there."""

from __future__ import annotations

from ipadapter_trainer.data.from_config import examples_from_config, image_root
from ipadapter_trainer.models.from_config import base_model_from_config
from ipadapter_trainer.settings.config import TrainConfig
from ipadapter_trainer.training.checks import total_steps
from ipadapter_trainer.training.dry_run import Plan, plan_training
from ipadapter_trainer.training.training_data import TrainingData, held_out_rows


def plan_of(config: TrainConfig) -> Plan:
    """`plan_training` without the checks of `check_training`, in one process."""
    examples = examples_from_config(config)
    size = len(examples) - len(held_out_rows(examples, config.validation_images, image_root(config)))
    data = TrainingData(size, "", lambda start: iter(()), dict, examples)
    steps = total_steps(config, -(-size // config.batch_size))
    return plan_training(config, base_model_from_config(config), data, steps)
