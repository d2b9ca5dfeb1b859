"""What a changed network still does: real networks on real inputs, seeded and offline.

Each evaluation takes the network as it was and as it is, as graphs or as functions, and gives the
figure that a user would notice: characters read, boxes found, frames heard, kinds of files told
apart, sentences embedded, bits for a byte.

    ocr.character_accuracy  ocr.box_overlap  ocr.upright_agreement   PP-OCR
    speech.agreement                                                 Silero VAD
    files.agreement                                                  Magika
    language.cosines        language.bits_per_byte                   MiniLM, SmolLM2
    layer_snr                                                        any graph, layer by layer
"""

from quernstone.bench.fidelity.common import Network, Split, layer_snr

__all__ = ["Network", "Split", "layer_snr"]
