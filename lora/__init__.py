"""LoRAs as values, in every public format, several at once on any network of linear layers. Start at `adapter.py`."""
