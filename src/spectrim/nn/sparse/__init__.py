"""Layers with sparse weights, and the kernels that multiply them."""
