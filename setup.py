"""`pip install -e .` installs minflux; `.[dev]` adds what its tests need, the other extras what only some need."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="minflux",
    version="0.1.0",
    description="FLUX.1 and the research grown on it, by hand, in pure PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["flux*", "lora*", "vlm_client*", "kernels*"]),
    package_data={"flux.demo": ["weights/*.safetensors", "weights/*.json", "weights/tokenizer/*", "weights/tokenizer_2/*"]},
    install_requires=[
        "torch>=2.9",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "einops",
        "numpy",
        "pillow>=10.1",
        "tqdm",
        "httpx",
        'triton; platform_system == "Linux"',
    ],
    extras_require={"dev": ["pytest", "ruff"], "tensorboard": ["tensorboard"]},
)
