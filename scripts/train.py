"""Trains a policy with DPO: `dpo train`, for `accelerate launch`.

accelerate launch scripts/train.py                                  # the packaged quickstart
accelerate launch scripts/train.py --config scripts/configs/neuralhermes.yaml
accelerate launch scripts/train.py --train.max_steps 50 --loss.beta 0.3
"""

from dpo.commands import run

if __name__ == "__main__":
    run("train", prog="scripts/train.py")
