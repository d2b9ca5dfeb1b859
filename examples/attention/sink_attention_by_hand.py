"""Attention with a learnable sink per head: the call, its gate, and a check by hand.

python examples/attention/sink_attention_by_hand.py
"""

import torch

from quernstone.attention import sink_attention

batch, heads, groups, tokens, width = 2, 8, 2, 512, 64
q = torch.randn(batch, heads, tokens, width)
k = torch.randn(batch, groups, tokens, width)
v = torch.randn(batch, groups, tokens, width)
sinks = torch.linspace(-4, 8, heads)

out, aux = sink_attention(q, k, v, sinks=sinks, return_aux=True)

# The same by hand: one more logit per head that takes weight and has no value.
logits = q @ k.repeat_interleave(heads // groups, dim=1).mT * width**-0.5
logits = logits.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)
with_sink = torch.cat([logits, sinks.view(-1, 1, 1).expand(batch, -1, tokens, 1)], dim=-1)
weights = with_sink.softmax(-1)[..., :-1]
by_hand = weights @ v.repeat_interleave(heads // groups, dim=1)

print(f"largest difference to the S x S way: {(out - by_hand).abs().max():.1e}")
print("sink logit and importance (mean gate) of each head:")
for sink, importance in zip(sinks.tolist(), aux.importance.tolist(), strict=True):
    print(f"  {sink:5.1f}  {importance:.3f}  {'#' * round(40 * importance)}")
