"""Diagnostics of rounds as they run, or of finished models: what is measured."""
