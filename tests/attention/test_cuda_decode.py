"""What the CUDA decode step says where there is no GPU."""

import pytest
import torch

from quernstone.attention import cuda_decode


def test_tensors_on_the_cpu_are_not_supported_and_refused_by_name() -> None:
    q, k = torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 9, 32)
    assert not cuda_decode.supports(q, k)
    with pytest.raises(ValueError, match=r"q\.device: got cpu, expected cuda"):
        cuda_decode.decode(q, k, k, sinks=torch.zeros(2))


def test_a_missing_library_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    absent = tmp_path_factory.mktemp("empty") / "libquernstone_cuda.so"
    monkeypatch.setattr(cuda_decode, "_PATH", absent)
    for cached in (cuda_decode.available, cuda_decode._packaged):
        monkeypatch.setattr(cuda_decode, cached.__name__, cached.__wrapped__)
    assert not cuda_decode.available()
    with pytest.raises(ImportError, match=r"pip install \. -C cmake.define.QS_CUDA=ON"):
        cuda_decode._packaged()
