"""Networks, diffusion models and their weights."""
