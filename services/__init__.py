"""One folder per process; everything but service.py and __main__.py is pure."""
