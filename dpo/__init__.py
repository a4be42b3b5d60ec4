"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290), by hand.

A pair is a prompt with a chosen and a rejected answer. Under the policy and under a frozen
reference, sum the log-probs of each answer's tokens. The implicit reward of an answer is
beta x (policy log-prob - reference log-prob); the loss of a pair is -log sigmoid(reward of the
chosen answer - reward of the rejected one). No reward model and no sampling: the gradient raises
the chosen answer's log-prob and lowers the rejected one's, most where the policy is most wrong.

Read in this order: `losses`, `logps`, `metrics` (the maths); `config`; `data.formats`,
`data.chat`, `data.stream`, `data.loader` (rows to tokens); `model.scorer`, `model.reference`
(tokens to log-probs); `train.trainer` (log-probs to a step).
"""
