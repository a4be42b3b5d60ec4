"""The slow truth: every answer by itself, full logits, plain Hugging Face, no code of ours."""

import torch


def answer_logps(causal_lm, prompt_ids, answer_ids):
    """Log-prob of each answer token after the prompt, (answer,) nats: one row, whole vocabulary."""
    ids = torch.tensor([[*prompt_ids, *answer_ids]])
    logits = causal_lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
    logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt_ids) - 1 :]


def stream_logps(causal_lm, pairs):
    """What Scorer returns for `build_stream(pairs)`: chosen_0, rejected_0, chosen_1, ..."""
    return torch.cat(
        [
            answer_logps(causal_lm, prompt, answer)
            for prompt, chosen, rejected in pairs
            for answer in (chosen, rejected)
        ]
    )
