"""Where a model's compute, memory and quality go: one file a kind of evidence, `schema.py` says what each returns."""
