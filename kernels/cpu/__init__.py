"""Compiled kernels of the CPU path: C sources, their build, and typed wrappers.

Every output element is a fixed sequence of IEEE fp32 operations that the source spells out, whatever the batch, the
row's place, the tile and the processor: that is what exact streams rest on. To add a kernel: a C file with `EXPORT void
regrow_...`, which the build finds by itself; a wrapper that declares it (library.py); a test that holds it against its
meaning in torch or numpy, and its bits on all instruction sets against each other (tests/kernels/test_cpu_*.py).
"""
