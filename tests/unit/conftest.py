"""Functions without a model: nothing here may import torch, transformers or Snakemake."""
