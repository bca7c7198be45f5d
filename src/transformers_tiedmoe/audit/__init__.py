"""Where a model's compute, memory and quality go; so far the metrics that conversion, healing and the demo report."""
