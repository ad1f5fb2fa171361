"""Diagnostics that are compiled into rounds, or look at models: what is measured."""
