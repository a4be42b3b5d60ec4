"""Folders of models, adapters and checkpoints, mutated at random: they train, or are refused.

`FUZZ` is twenty times their number; `make fuzz N=100000` prints what came of them.
"""

import json
import random
import shutil
import signal

import pytest

from dpo import sealed
from dpo.errors import UserError
from dpo.train.trainer import Run
from tests.fuzz.test_rows import MUTATIONS, mutated
from tests.models import QUICKSTART_MODEL
from tests.train.runs import adapter_folder, config, forget_accelerate, run

SECONDS = 60  # whatever a file says, nothing takes longer


def damage(file, chance):
    """Changes a file: its values, if it is JSON, or some of its bytes."""
    content = bytearray(file.read_bytes())
    how = chance.randrange(4)
    if file.suffix == ".json" and how < 2:
        value = json.loads(content)
        for _ in range(chance.randint(1, 2)):
            value = mutated(value, chance)
        file.write_text(json.dumps(value), errors="surrogatepass")
    elif how == 2:
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        head = min(len(content), 2000) if chance.random() < 0.5 else len(content)
        for _ in range(3):
            content[chance.randrange(head)] = chance.randrange(256)
        file.write_bytes(content)


def too_long(*_):
    raise TimeoutError("it takes too long")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, an adapter and a checkpoint that are whole."""
    folder = tmp_path_factory.mktemp("whole")
    model = shutil.copytree(QUICKSTART_MODEL, folder / "model")
    checkpoint = run(config(folder, "--train.save_steps", 1, "--train.max_steps", 1))
    return {
        "home": folder,
        "model": model,
        "adapter": adapter_folder(folder),
        "checkpoint": checkpoint / "checkpoint-1",
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["model", "adapter", "checkpoint"])
def test_a_mutated_folder_trains_or_is_refused_by_its_place(kind, whole, tmp_path, record_property):
    chance = random.Random(kind)
    trained, refused, tracebacks, nameless = 0, 0, [], []
    before = signal.signal(signal.SIGALRM, too_long)
    number = max(MUTATIONS // 60, 1)
    for trial in range(number + 1):
        folder = shutil.copytree(whole[kind], tmp_path / kind / "checkpoint-1")
        file = chance.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        if trial:  # the first is whole, and must train
            damage(file, chance)
        if kind == "checkpoint":
            if chance.random() < 0.9:
                sealed.seal(folder)
            flags = ["--train.resume", folder]
        else:
            flags = ["--model.name_or_path", folder]
        signal.alarm(SECONDS)
        try:
            forget_accelerate()
            flags += ["--train.output_dir", tmp_path / "run", "--train.max_steps", 2]
            made = Run(config(whole["home"], *flags))
            made.check_start()
            made.train_step(2)
            made.tracker.close()
            trained += bool(trial)
        except UserError as error:
            refused += 1
            if not trial:
                raise
            if not any(place in str(error) for place in (str(folder), "model.", "train.", "data.")):
                nameless.append(str(error)[:300])
        except Exception as error:
            kept = tmp_path / f"bad-{len(tracebacks)}"
            shutil.copytree(folder, kept)
            tracebacks.append((file.name, str(kept), repr(error)[:300]))
        finally:
            signal.alarm(0)
        shutil.rmtree(tmp_path / kind)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    signal.signal(signal.SIGALRM, before)
    outcome = f"{trained} trained, {refused} refused, {len(tracebacks)} tracebacks"
    record_property(
        "figures", f"{number} {kind} folders: {outcome}, {len(nameless)} without a place"
    )
    assert not nameless, "\n".join(nameless[:20])
    assert not tracebacks, "\n".join(map(str, tracebacks[:20]))
