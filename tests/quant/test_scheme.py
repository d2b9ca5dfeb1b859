"""A scheme says what codes there are, and refuses what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from quernstone.quant import Scheme


@pytest.mark.parametrize(
    ("scheme", "codes"),
    [
        (Scheme(2), (-1, 1)),
        (Scheme(4, full_range=True), (-8, 7)),
        (Scheme(8), (-127, 127)),
        (Scheme(3, symmetric=False), (0, 7)),
        (Scheme(8, symmetric=False), (0, 255)),
    ],
)
def test_codes_of_a_scheme(scheme: Scheme, codes: tuple[int, int]) -> None:
    assert (scheme.lowest, scheme.highest) == codes


def test_a_scheme_comes_back_from_its_fields() -> None:
    scheme = Scheme(4, symmetric=False, granularity="group", group=32, scale="bf16")
    assert Scheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits: got 1, expected 2 to 8"),
        ({"bits": 9}, "bits: got 9, expected 2 to 8"),
        ({"bits": 4, "granularity": "row"}, "granularity: got 'row'"),
        ({"bits": 4, "scale": "fp8"}, "scale: got 'fp8'"),
        ({"bits": 4, "granularity": "group"}, "group: got 0 with granularity 'group'"),
        ({"bits": 4, "group": 32}, "group: got 32 with granularity 'channel'"),
        ({"bits": 4, "granularity": "group", "group": -32}, "group: got -32"),
        ({"bits": 4, "symmetric": False, "full_range": True}, "full_range: got True"),
    ],
)
def test_refuses_what_no_quantiser_is(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(**fields)


@pytest.mark.parametrize("fields", [{"bits": 4.0}, {"bits": True}, {"bits": 4, "symmetric": 1}])
def test_refuses_a_field_of_another_type(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="expected a"):
        Scheme(**fields)


def test_names_the_fields_of_another_version() -> None:
    with pytest.raises(ValueError, match="scheme: got fields"):
        Scheme.from_dict({"bits": 4, "colour": "red"})
