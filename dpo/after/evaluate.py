"""Measures a finished run: held-out pairs, win rate by a judge, lm-eval; base beside policy.

"Base" is the model before training, with the adapter that the run started from, if any. It is the
reference, unless the run had none: rewards are then beta times the policy's own log-probs, as in
training, and the KL is measured to the model before training.
"""

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo import run_folder
from dpo.after.finished import FinishedRun, read_run
from dpo.after.harness import load_tasks, run_harness
from dpo.after.judges import (
    EndpointJudge,
    FunctionJudge,
    JudgedAnswers,
    judge_all,
    load_judge,
    win_rate_statistics,
)
from dpo.after.options import EvaluateOptions
from dpo.after.output import check_output
from dpo.data.chat import stop_ids
from dpo.data.loader import Pairs, load_data
from dpo.data.order import spread
from dpo.data.stream import Stream, TokenizedPair
from dpo.data.templates import choose_template
from dpo.errors import UserError
from dpo.evaluate.evaluator import held_out_columns, score_pairs
from dpo.evaluate.samples import generate
from dpo.evaluate.statistics import Columns, group_statistics
from dpo.model.reference import TokenLogps, choose_mode
from dpo.model.scorer import Scorer
from dpo.report.evaluation_tables import evaluation_tables
from dpo.sealed import file_sums


def evaluate_run(folder: Path, options: EvaluateOptions) -> Iterator[str]:
    """Measures part by part; writes each part to its own file at once, and yields its tables.

    A file says which weights were measured, with which options and versions. A value that is not
    finite does not cost the others: it is written as NaN or Infinity, which Python reads and strict
    JSON does not know.

    Raises:
        UserError: an option that cannot be honoured, or no pairs to measure on.
    """
    # Check everything that can be misspelt before the slow work.
    options.check()
    read_run(folder)
    output = options.output or folder
    for name in (*run_folder.MEASURED.values(), run_folder.JUDGED):
        check_output(output / name)
    judge = load_judge(options.judge, options.judge_model) if options.judge else None
    names = [name.strip() for name in (options.lm_eval or "").split(",") if name.strip()]
    tasks = load_tasks(names, options.include_path) if names else []
    finished = FinishedRun(folder, options.weights)
    pairs, rows = _pairs(finished, options)
    if not len(pairs) and (judge or not tasks):
        raise UserError(
            f"{folder} held nothing out, so there are no pairs to measure on. Name a file of rows "
            "in --data_path, in any format that training reads; or train with data.eval_fraction "
            "or data.eval_path."
        )
    about = {
        "run": str(folder),
        "weights": options.weights,
        "sha256": file_sums(finished.weights, "*.safetensors"),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "versions": _versions(bool(tasks)),
    }
    if len(pairs):
        results = {"rows": rows, **measure_pairs(finished, pairs, options)}
        yield from _written(output, "held_out", about | results)
    if judge:
        results = measure_win_rate(finished, pairs, judge, options, output / run_folder.JUDGED)
        yield from _written(output, "win_rate", about | results)
    if tasks:
        results = run_harness(finished, tasks, batch_size=options.batch_size, limit=options.limit)
        yield from _written(output, "lm_eval", about | results)


def _written(output: Path, part: str, results: dict[str, Any]) -> Iterator[str]:
    """Writes the file of one part; yields its tables, and where the file is."""
    file = output / run_folder.MEASURED[part]
    text = json.dumps(results, indent=1)
    file.write_text(text + "\n")
    yield from map(str, evaluation_tables({part: results}))
    yield f"All numbers are in {file}."
    not_finite: list[str] = []
    json.loads(text, parse_constant=not_finite.append)
    if not_finite:
        yield f"Not finite: {len(not_finite)} of them. Strict readers of JSON refuse the file."


def _pairs(finished: FinishedRun, options: EvaluateOptions) -> tuple[Pairs, str]:
    """The run's held-out pairs, or those of a file under the run's template; and a description."""
    if options.data_path is None:
        try:
            return finished.data.held_out, "held out by the run"
        except UserError as error:
            raise UserError(f"{error} Or name pairs to measure on by --data_path.") from None
    data = replace(
        finished.config.data,
        name_or_path=options.data_path,
        format=options.data_format,
        subset=None,
        revision=None,
        split="train",
        eval_path=None,
        eval_split="train",
        eval_fraction=0.0,
    )
    loaded = load_data(replace(finished.config, data=data), finished.tokenizer)
    return loaded.train, f"{options.data_path}: {loaded.summary[0].removeprefix('data: ')}"


def measure_pairs(finished: FinishedRun, pairs: Pairs, options: EvaluateOptions) -> dict[str, Any]:
    """The statistics of held-out pairs, by group; and whether the run had a reference."""
    has_reference = choose_mode(finished.config.reference_mode, finished.policy) != "zero"
    return {
        "has_reference": has_reference,
        "beta": finished.config.loss.beta,
        **group_statistics(_columns(finished, pairs, options), beta=finished.config.loss.beta),
    }


def _columns(finished: FinishedRun, pairs: Pairs, options: EvaluateOptions) -> Columns:
    before = before_training(finished)
    how: dict[str, Any] = {
        "tokens_per_microbatch": finished.config.train.scoring_tokens,
        "device": finished.device,
    }
    logps = score_pairs(pairs, finished.scorer, finished.reference, **how)
    started = logps
    if before is not finished.reference:
        started = score_pairs(pairs, finished.scorer, before, **how)
    chosen = spread(len(pairs), options.prompts)
    prompts = [pairs[int(i)].prompt_ids for i in chosen]
    sampling = _sampling(finished, options, 1.0)
    sampled = generate(finished.policy.model, finished.tokenizer, prompts, **sampling)
    # A stream needs two answers; the same one twice is computed once.
    answered = [TokenizedPair(*ids) for ids in zip(prompts, sampled, sampled, strict=True)]
    log_ratios = np.full(len(pairs), np.nan)
    of_sampled = score_pairs(answered, finished.scorer, before, **how)
    log_ratios[chosen] = of_sampled.chosen_logratios.numpy()
    columns = {name: np.array(values) for name, values in held_out_columns(pairs, logps).items()}
    return columns | {
        "before_chosen_logps": started.ref_chosen_logps.numpy(),
        "before_rejected_logps": started.ref_rejected_logps.numpy(),
        "sampled_log_ratios": log_ratios,
    }


def before_training(finished: FinishedRun) -> TokenLogps:
    """Token log-probs of the model before training, also where the run had no reference."""
    if choose_mode(finished.config.reference_mode, finished.policy) != "zero":
        return finished.reference
    with finished.before() as model:
        scorer = Scorer(model, finished.scorer.layout)

    def score(stream: Stream) -> torch.Tensor:
        with torch.no_grad(), finished.before():
            return scorer(stream)

    return score


def _sampling(
    finished: FinishedRun, options: EvaluateOptions, temperature: float
) -> dict[str, Any]:
    template = choose_template(finished.tokenizer, finished.config.data)
    return {
        "stop_ids": stop_ids(finished.policy.model, finished.tokenizer, template),
        "max_new_tokens": options.max_new_tokens or finished.config.train.eval_max_new_tokens,
        "temperature": temperature,
        "seed": options.seed,
        "batch_size": options.batch_size,
    }


def measure_win_rate(
    finished: FinishedRun,
    pairs: Pairs,
    judge: FunctionJudge | EndpointJudge,
    options: EvaluateOptions,
    file: Path,
) -> dict[str, Any]:
    """Lets both models answer the same prompts from the same seed, and the judge compare them."""
    chosen = [int(i) for i in spread(len(pairs), options.prompts)]
    prompts = [pairs[i].prompt_ids for i in chosen]
    how = _sampling(finished, options, options.temperature)
    how["top_p"] = options.top_p
    policy = generate(finished.policy.model, finished.tokenizer, prompts, **how)
    with finished.before() as model:
        base = generate(model, finished.tokenizer, prompts, **how)

    def text(ids: Any) -> str:
        return str(finished.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    answers = [
        JudgedAnswers(
            row=pairs.row_name(i),
            prompt=str(finished.tokenizer.decode(list(pairs[i].prompt_ids))),
            chosen=text(pairs[i].chosen_ids),
            base=text(by_base),
            policy=text(by_policy),
            base_length=len(by_base),
            policy_length=len(by_policy),
        )
        for i, by_base, by_policy in zip(chosen, base, policy, strict=True)
    ]
    figures: dict[str, Any] = {"judge": options.judge, "judged_answers": str(file)}
    unfinished = file.with_suffix(".part")  # the old file stays until every answer is judged
    figures |= win_rate_statistics(answers, judge_all(judge, answers, unfinished))
    unfinished.replace(file)
    for side, written in (("base", base), ("policy", policy)):
        figures[f"cut_{side}"] = sum(ids[-1] not in how["stop_ids"] for ids in written)
        if options.judge == "exact_match":
            right = sum(getattr(answer, side) == answer.chosen for answer in answers)
            figures[f"exact_match_{side}"] = right / len(answers)
    return figures


def _versions(with_lm_eval: bool) -> dict[str, str]:
    packages = ["torch", "transformers", "peft"] + ["lm_eval"] * with_lm_eval
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
