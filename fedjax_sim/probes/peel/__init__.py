"""Layer-peeled analysis: what aggregation does to every layer, measured right after a round."""
