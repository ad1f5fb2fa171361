"""What is drawn and said of runs that are over."""
