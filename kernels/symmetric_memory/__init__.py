"""Heaps of equal layout, one per rank, that other ranks map and that outlive the process which made them."""
