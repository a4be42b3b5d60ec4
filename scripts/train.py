"""Trains a policy with DPO.

accelerate launch scripts/train.py                                  # the packaged quickstart
accelerate launch scripts/train.py --config scripts/configs/neuralhermes.yaml
accelerate launch scripts/train.py --train.max_steps 50 --loss.beta 0.3
"""

from dpo.cli import parse, run_script


def main() -> None:
    """Reads the configuration first: mistakes in it are reported before the slow imports."""
    config = parse()
    from dpo.train.trainer import train

    train(config)


if __name__ == "__main__":
    run_script(
        main, "stopped; with train.resume auto, the same command goes on from the last checkpoint"
    )
