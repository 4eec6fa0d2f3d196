"""Runnable examples of commlib: first contact, one MoE layer, one training run."""
