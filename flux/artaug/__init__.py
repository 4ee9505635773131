"""ArtAug's training (arXiv 2412.12888): from a critic's advice to a LoRA that needs no critic."""
