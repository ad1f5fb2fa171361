"""Convolutions and products of many clients' models side by side, each in several implementations."""
