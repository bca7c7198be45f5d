"""Training of tied models: text to blocks, healing after a conversion, parameter groups."""
