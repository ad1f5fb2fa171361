"""Layer-peeled analysis: what aggregation does to every layer, measured inside the compiled round."""
