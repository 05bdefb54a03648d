"""Reads and writes Hugging Face folders."""
