"""Convolutions and products of many clients' models side by side, in several spellings."""
