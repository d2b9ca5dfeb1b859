"""What the CUDA decode step says where there is no GPU."""

import pytest
import torch

from quernstone.attention import cuda_decode


def test_tensors_on_the_cpu_are_not_supported_and_refused_by_name() -> None:
    q, k = torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 9, 32)
    assert not cuda_decode.supports(q, k)
    with pytest.raises(ValueError, match=r"q\.device: got cpu, expected cuda"):
        cuda_decode.decode(q, k, k, sinks=torch.zeros(2))
