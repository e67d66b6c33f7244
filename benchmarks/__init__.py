"""Measurements; results/ holds each with hardware, date, commit and command."""
