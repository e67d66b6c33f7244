"""Shared vocabulary of the services: messages, configuration, transport, views, placement."""
