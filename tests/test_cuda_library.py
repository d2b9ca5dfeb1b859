"""What the loader of the CUDA kernels says where they were not built."""

import pytest

from quernstone import _cuda


def test_a_missing_library_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    absent = tmp_path_factory.mktemp("empty") / "libquernstone_cuda.so"
    monkeypatch.setattr(_cuda, "PATH", absent)
    monkeypatch.setattr(_cuda, "available", _cuda.available.__wrapped__)
    assert not _cuda.available()
    with pytest.raises(ImportError, match=r"pip install \. -C cmake.define.QS_CUDA=ON"):
        _cuda.required()
