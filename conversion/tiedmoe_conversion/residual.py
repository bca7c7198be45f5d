"""What one layer adds to its pool's weights: low-rank factors per slot, `W[slot] + b @ a`."""

from collections.abc import Mapping

import torch

# By layer index and name of the projection: `b [E, rows, r]` and `a [E, r, columns]` in the family's own layout.
Residuals = Mapping[int, Mapping[str, tuple[torch.Tensor, torch.Tensor]]]
