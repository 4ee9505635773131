"""Low-rank adaptation: a small change of a frozen FLUX, learned from a folder of captioned pictures.

The training is in `flux/lora_training.py`, as the demo's pool of LoRAs uses it too; LoRAs themselves are in `lora/`.
"""

from flux.lora_training import TrainLora

TRAIN = {"": TrainLora}
