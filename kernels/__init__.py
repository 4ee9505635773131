"""Fused operations, one file each: the reference in plain PyTorch, the Triton kernels, the function that picks.

Imports none of our other packages. Importing needs neither Triton nor a GPU; without them the reference runs.
"""

__version__ = "0.0.0"  # Hugging Face has a package of this name, whose version transformers asks for
