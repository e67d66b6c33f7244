"""Elastic expert-parallel operations over symmetric memory. Import the modules, not this package: the name is also a
Hugging Face package.
"""
