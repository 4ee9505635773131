"""minflux: FLUX.1 by hand in PyTorch. Start at `flux/model.py`, or at `flux/recipes/t2i.py` for the whole road."""

__version__ = "0.1.0"
