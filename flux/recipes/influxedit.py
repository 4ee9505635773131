"""InFluxEdit: pictures edited as told, by LoRAs on FLUX.1-Fill that learned from pairs before and after."""

from flux.edit_training import TrainEdit

TRAIN = {"": TrainEdit}
