"""Measurements of the elastic EP kernels: ``python -m benchmarks.kernels.elastic``."""
