"""The two fine-tune phases of GPUSQ-ViT's Algorithm 1."""
