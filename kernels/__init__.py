"""Fused kernels, one file per operation: the reference in plain PyTorch, the kernel, its gradient, what picks one."""

__version__ = "0.0.0"  # `kernels` is also a package of Hugging Face; some transformers 5.x ask it for a version
