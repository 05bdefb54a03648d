"""Devices, processes and parts of a batch."""
