"""The DPO loss of one pair, by hand: plain Hugging Face logits, one answer at a time.

    python docs/dpo_by_hand.py

A test holds that dpo.losses and dpo.model.scorer give the same number to 1e-5.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.config import PACKAGE

PROMPT = "<|im_start|>user\nWhich number is larger, 7 or 9?<|im_end|>\n<|im_start|>assistant\n"
CHOSEN, REJECTED, BETA = "The larger number is 9.<|im_end|>", "It is 7.<|im_end|>", 0.1


def answer_logp(model, prompt, answer):
    """Log pi(answer | prompt): its tokens' log-probs, each predicted one place before, summed."""
    ids = torch.tensor([prompt + answer])
    logps = model(ids).logits[0, :-1].log_softmax(-1)  # position t predicts token t + 1
    return logps.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :].sum()


def dpo_loss(policy, reference, prompt, chosen, rejected, beta=BETA):
    """-log sigmoid(beta x (chosen log-ratio - rejected log-ratio))."""
    logratio = [
        answer_logp(policy, prompt, answer) - answer_logp(reference, prompt, answer)
        for answer in (chosen, rejected)
    ]
    return -torch.nn.functional.logsigmoid(beta * (logratio[0] - logratio[1]))


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "quickstart/model")
    pair = [tokenizer(text)["input_ids"] for text in (PROMPT, CHOSEN, REJECTED)]
    reference, policy = (
        AutoModelForCausalLM.from_pretrained(PACKAGE / "quickstart/model", dtype=torch.float32)
        for _ in range(2)
    )
    print("before training:", dpo_loss(policy, reference, *pair).item(), "= ln 2")
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)  # stands in for training
    print("after a change: ", dpo_loss(policy, reference, *pair).item())
