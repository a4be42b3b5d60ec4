"""What `dpo evaluate` measures; a module of its own, so that `--help` does not wait for torch."""

from dataclasses import dataclass
from pathlib import Path

from dpo import run_folder
from dpo.errors import UserError
from dpo.evaluate.sampling import Sampling

# An option that does nothing without another.
_NEEDS = {
    "data_format": "data_path",
    "judge_model": "judge",
    "temperature": "judge",
    "top_p": "judge",
    "include_path": "lm_eval",
    "limit": "lm_eval",
}


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to measure; null is the run's own value."""

    weights: str = run_folder.FINAL
    """final, best or checkpoint-N"""
    data_path: str | None = None
    """other pairs than the held-out ones: a file in any known format"""
    data_format: str = "auto"
    """their format, as data.format in training"""
    prompts: int = 200
    """held-out prompts to answer: for KL and judge"""
    max_new_tokens: int | None = None
    """longest answer; the run's train.eval_max_new_tokens"""
    temperature: float = 0.0
    """of the judged answers; 0 is greedy"""
    top_p: float = 1.0
    """of the judged answers"""
    seed: int = 0
    """of the sampled answers"""
    judge: str | None = None
    """exact_match, MODULE:FUNCTION (prompt, policy, base, chosen -> 0..1) or URL"""
    judge_model: str | None = None
    """model at that URL; its key comes from OPENAI_API_KEY"""
    lm_eval: str | None = None
    """open_llm_leaderboard, or names of lm-eval tasks, with commas"""
    include_path: Path | None = None
    """folder with the YAML of lm-eval tasks of your own"""
    limit: int | None = None
    """most documents of each lm-eval task, for a trial"""
    batch_size: int = 16
    """answers written, or documents scored, at once"""
    output: Path | None = None
    """folder of the files; default: the run folder"""

    def check(self) -> None:
        """Refuses numbers out of range, and options that would do nothing."""
        for name in ("prompts", "max_new_tokens", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: got {value}, wanted 1 or more.")
        Sampling(temperature=self.temperature, top_p=self.top_p)
        for name, needed in _NEEDS.items():
            value = getattr(self, name)
            if value != getattr(EvaluateOptions, name) and not getattr(self, needed):
                raise UserError(
                    f"--{name}: got {value}, which does nothing without --{needed}. Leave it out, "
                    f"or give --{needed}."
                )
