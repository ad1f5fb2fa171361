"""A RUN ON A MACHINE THAT IS NOT HERE: its programs compiled for it, and what XLA says of them."""
