"""AutoLoRA: LoRAs found by their weights for a prompt, and several applied at once (arXiv 2508.02107).

The retriever is in `flux/retriever.py`; `python -m flux.lora_search` indexes a folder and searches it.
"""

from flux.retriever import TrainRetriever

TRAIN = {"retriever": TrainRetriever}
