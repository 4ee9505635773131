"""LoRAs as values, in every public format, several at once on any network of linear layers. Start at `adapter.py`.

Nothing here knows FLUX.1, whose names come in from `flux/lora_names.py`; but for `__main__.py` and the benchmarks, which
are commands, only `flux.checkpoint` and `flux.errors` are imported from there.
"""
