"""The health monitor: who is in the group, why, and what became of the others. Only `service.py` does I/O."""
