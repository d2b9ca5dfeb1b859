"""Real weights with fewer ones: a classifier of text lines, rounded with calibration inputs alone.

pip install --no-deps rapidocr_onnxruntime
"""

from quernstone.bench.fidelity import ocr
from quernstone.importers import models, write_onnx
from quernstone.pim.network import compress

graph = models.pp_ocr("classifier")
pictures, _ = ocr.turned("calibration")
found = compress(graph, [{"x": pictures}], snr=34.0)

print(f"Hamming rate {found.hamming_rate_before:.3f} to {found.hamming_rate:.3f}")
for layer in sorted(found.layers, key=lambda layer: -layer.size)[:5]:
    print(
        f"{layer.name:24} {layer.size:7,} weights: {layer.hamming_rate_before:.3f} to "
        f"{layer.hamming_rate:.3f}, shift {layer.shift}, {layer.snr:.1f} dB"
    )
print(f"decisions as before: {100 * ocr.upright_agreement(found.int8, found.network):.1f} %")
write_onnx(found.folded(), "few_ones.onnx")
