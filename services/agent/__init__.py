"""Starts, restarts, signals and reaps the processes of one host or one container."""
