"""Megatron-Core on commlib: python -m examples.megatron."""
