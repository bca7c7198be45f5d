"""What a checkpoint's tensors are: a family's parameters, a tied layer's view of a pool, an expert's neurons."""
