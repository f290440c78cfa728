"""The samples of a run."""

from __future__ import annotations

from hashlib import sha256

from svite_scale.config.schema import Config
from svite_scale.data.format.patterns import check_contents, largest_label
from svite_scale.data.loader import EvalData, TrainData
from svite_scale.errors import ConfigError
from svite_scale.runtime.ranks import World


def open_data(config: Config, world: World) -> tuple[TrainData, EvalData]:
    """This rank's share of the training and the evaluation samples.

    Raises:
        ConfigError: labels don't fit the model.
        DataError: the shards can't be read.
    """
    model, train = config.model, config.train
    image_shape = (model.in_channels, model.image_size, model.image_size)
    train_data = TrainData(
        config.data,
        image_shape=image_shape,
        global_batch_size=train.global_batch_size,
        seed=config.seed,
        accumulation_steps=train.accumulation_steps,
        world=world,
    )
    eval_data = EvalData(config.data, image_shape=image_shape, batch_size=train.eval_batch_size, world=world)
    indexes = train_data.indexes + eval_data.indexes
    if config.data.verify_checksums:
        check_contents(indexes, world.rank, world.size)
    largest, place = largest_label(indexes)
    if largest >= model.num_classes:
        problem = f"is too few for labels 0 to {largest}, which is that of {place}"
        raise ConfigError("model.num_classes", model.num_classes, problem, "raise it, or correct the label")
    return train_data, eval_data


def identity(data: TrainData) -> dict[str, object]:
    """What a run trains on, wherever it is stored: the number of samples, and a checksum over those of the shards, in order."""
    return {"samples": data.num_samples, "sha256": sha256("".join(index.sha256 for index in data.indexes).encode()).hexdigest()}
