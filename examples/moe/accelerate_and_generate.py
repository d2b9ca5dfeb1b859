"""A mixture of experts of transformers on packed experts: the trained tiny model of this package.

python examples/moe/accelerate_and_generate.py
"""

import copy

import torch

from quernstone.bench.cases.moe_model import of_tinylm
from quernstone.bench.tinylm import experts as tiny
from quernstone.moe import accelerate

# Any Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or DeepSeek of transformers would do; this one reads and
# writes bytes, has 16 experts of which a token takes 2, and was trained on documentation.
model = of_tinylm(tiny.load("top2of16"))
packed = accelerate(copy.deepcopy(model), format="int4", linear="int8", attention="quernstone")

prompt = torch.tensor([[*b"Return the number of "]])
with packed.quernstone as handle:
    written = packed.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False
    )
    print(bytes(written[0].tolist()).decode(errors="replace"))
    with torch.no_grad():
        ours, theirs = (m(written).logits.log_softmax(-1) for m in (packed, model))
    print(f"{handle.step_bytes() / 1e6:.2f} MB of weights a token")
divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
print(f"mean divergence from the model before: {divergence:.4f} nats")
