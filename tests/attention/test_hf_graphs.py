"""Models with attn_implementation="quernstone" under torch.compile and torch.export."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.hf_tiny import (
    assert_close,
    one_thread,  # noqa: F401  (a fixture)
    padding,
    run,
    tiny,
    tokens,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def _holes() -> Tensor:
    mask = torch.ones(3, 23, dtype=torch.int64)
    mask[1, 4] = 0
    return mask


@pytest.mark.parametrize("side", [None, "left"])
def test_a_compiled_model_equals_itself(side: str | None) -> None:
    model, mask = tiny("llama", num_hidden_layers=1), padding(side)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    want = run(model, "quernstone", **inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_close(compiled(**inputs).logits, want, mask)
        if side is not None:
            with pytest.raises(ValueError, match="masked key lies between visible ones"):
                compiled(**inputs | {"attention_mask": _holes()})


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_an_exported_model_equals_itself(name: str, side: str | None) -> None:
    model, ids = tiny(name), tokens()
    inputs: dict[str, Any] = {"attention_mask": padding(side), "use_cache": False}
    want = run(model, "quernstone", input_ids=ids, **inputs)
    with torch.no_grad():
        exported = torch.export.export(model, (ids,), inputs, strict=False).module()
        assert_close(exported(ids, **inputs).logits, want, inputs["attention_mask"])
        if side is not None:
            with pytest.raises(RuntimeError, match="masked key lies between visible ones"):
                exported(ids, **inputs | {"attention_mask": _holes()})
