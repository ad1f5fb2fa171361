"""Loss landscapes, measured on finished runs and reported: figures and tables."""
