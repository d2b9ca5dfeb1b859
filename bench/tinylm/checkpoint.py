"""Trained weights in bf16 with what made them, in one .npz file.

NumPy has no bf16: the weights lie there as uint16, which are the upper halves of fp32.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quernstone.bench.tinylm.model import Config, TinyLm

FOLDER = Path(__file__).with_name("checkpoints")
_META = "meta"


class BadCheckpoint(ValueError):
    """The file is not a whole checkpoint of tinylm."""


@dataclass(frozen=True)
class Checkpoint:
    model: TinyLm
    meta: dict[str, Any]
    """At least `config`, `recipe` (with its seed), `command` and `corpus`."""


def save(path: Path, model: TinyLm, meta: dict[str, Any]) -> None:
    """Writes the weights rounded to bf16; the same model and `meta` give the same bytes."""
    arrays = {
        name: weight.to(torch.bfloat16).view(torch.uint16).numpy()
        for name, weight in model.state_dict().items()
    }
    words = json.dumps({"config": model.config.to_dict(), **meta}, sort_keys=True).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, **{_META: np.frombuffer(words, dtype=np.uint8)}, **arrays)


def load(path: Path) -> Checkpoint:
    """The model in eval mode, in fp32, and what made it.

    Raises:
        BadCheckpoint: the file is cut off, damaged, or of another shape than its metadata says.
        FileNotFoundError: there is no such file.
    """
    try:
        with path.open("rb") as data, np.load(data, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop(_META).tobytes())
        config = Config(**meta["config"])
        model = TinyLm(config)
        weights = {
            name: torch.from_numpy(bits).view(torch.bfloat16).float()
            for name, bits in arrays.items()
        }
        model.load_state_dict(weights)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.name}: not here; python -m quernstone.bench.study trains and exports it"
        ) from None
    except (
        *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadCheckpoint(
            f"{path.name}: got a file that cannot be read ({why}), expected a whole checkpoint "
            "of tinylm; restore it with git checkout or train it anew"
        ) from None
    return Checkpoint(model.eval(), meta)
