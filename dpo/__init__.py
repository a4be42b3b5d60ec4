"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290), by hand.

A pair is a prompt with a chosen and a rejected answer. Under the policy and under a frozen
reference, sum the log-probs of each answer's tokens. The implicit reward of an answer is
beta x (policy log-prob - reference log-prob); the loss of a pair is -log sigmoid(reward of the
chosen answer - reward of the rejected one). No reward model and no sampling: the gradient raises
the chosen answer's log-prob and lowers the rejected one's, most where the policy is most wrong.

Read in this order: `data.formats`, `data.chat`, `data.stream` (rows to a stream of tokens);
`model.scorer`, `model.reference` (a stream to hidden states, under both models); `logps` (states to
log-probs of tokens, then of pairs); `losses`, `metrics` (pairs to a loss); `train.step`,
`train.trainer` (a loss to a step, and to a run). Beside them: `config`, `cli`, `run_folder`; `plan`
(what a run will take), `evaluate` (the held-out evaluation during one), `report` (its page),
`after` (merge, generate, evaluate, push).
"""
