"""Mixed precision in the layers that call `sink_attention`.

The call itself takes the types that it is given. A layer under torch.autocast cannot give it one
type: projections yield the type of autocast, and what is rotated or normalised after them is fp32.
"""

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors as torch's own attention takes them: under torch.autocast in its type."""
    device = tensors[0].device.type
    # Meta tensors know no autocast.
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) for x in tensors]
