"""Only what was verified goes to the hub, and nothing is public by accident."""

import json

import pytest
from huggingface_hub import constants

from dpo.after.push import RECORD, check_can_push, push, verified_files, write_record
from dpo.errors import UserError
from tests.after.hub import TOKEN, running_hub

# huggingface_hub 2.4 hands its own HTTP client a file in a way that that one wants otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ASKED = {"weights": "final", "base": "auto", "dtype": "auto"}


def merged_folder(folder):
    """(run, merged folder) with a record, and little else."""
    run, merged = folder / "run", folder / "merged"
    (run / "final").mkdir(parents=True)
    merged.mkdir()
    (run / "final" / "adapter_model.safetensors").write_bytes(b"adapter")
    (merged / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (merged / "config.json").write_text("{}")
    (merged / "README.md").write_text("---\ntags: [dpo]\n---\n# Card\n")
    write_record(merged, run / "final", "original", "float32", {})
    return run, merged


def test_only_what_was_verified_is_pushed_again(tmp_path):
    run, merged = merged_folder(tmp_path)
    (merged / "README.md").write_text("---\nlicense: mit\n---\n# Edited\n")
    (merged / "notes.txt").write_text("came later")
    files = ["README.md", "config.json", "model.safetensors", RECORD]
    assert sorted(verified_files(merged, run, **ASKED)) == sorted(files)
    assert verified_files(merged, run, weights="final", base="auto", dtype="float32")

    with pytest.raises(UserError, match=r"another merge than asked for \(dtype float32\)"):
        verified_files(merged, run, weights="final", base="auto", dtype="bfloat16")
    (merged / "config.json").write_text("{ }")
    with pytest.raises(UserError, match=r"config.json is no longer what was verified"):
        verified_files(merged, run, **ASKED)


@pytest.mark.parametrize("record", ["", "{", "{}", "[]", "null", '{"weights": "final"}', "\xff"])
def test_a_broken_record_is_told_and_nothing_of_it_is_pushed(tmp_path, record):
    run, merged = merged_folder(tmp_path)
    (merged / RECORD).write_bytes(record.encode("latin-1"))
    with pytest.raises(UserError, match=r"merge\.json is broken.* Move .* away and merge again"):
        verified_files(merged, run, **ASKED)


def test_a_record_whose_files_are_no_sums_is_broken(tmp_path):
    run, merged = merged_folder(tmp_path)
    record = json.loads((merged / RECORD).read_text())
    (merged / RECORD).write_text(json.dumps(record | {"files": ["config.json"]}))
    with pytest.raises(UserError, match=r"merge\.json is broken"):
        verified_files(merged, run, **ASKED)


def test_a_merge_of_weights_that_were_trained_on_since_is_not_pushed(tmp_path):
    run, merged = merged_folder(tmp_path)
    (run / "final" / "adapter_model.safetensors").write_bytes(b"trained further")
    with pytest.raises(UserError, match="other weights"):
        verified_files(merged, run, **ASKED)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of this machine, and a client that talks to it with a token from the environment."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def pushed(folder, repo="me/model", *, public=False):
    run, merged = merged_folder(folder)
    return push(merged, verified_files(merged, run, **ASKED), repo, public=public), merged


def test_a_push_arrives_byte_for_byte_in_a_private_repository(hub, tmp_path):
    url, merged = pushed(tmp_path)
    assert url == f"{hub.url}/me/model"
    assert hub.visibility == {"me/model": "private"}
    assert hub.files["me/model"] == {file.name: file.read_bytes() for file in merged.iterdir()}


def test_the_token_goes_nowhere_but_into_the_authorization_header(hub, tmp_path, capsys):
    pushed(tmp_path)
    assert any(r.headers.get("authorization") == f"Bearer {TOKEN}" for r in hub.requests)
    for request in hub.requests:
        request.headers.pop("authorization", None)
        assert TOKEN not in f"{request.path} {request.headers} {request.body!r}"
    assert TOKEN not in "".join(capsys.readouterr())


def test_public_is_sent_when_asked_for(hub, tmp_path):
    pushed(tmp_path, public=True)
    assert hub.visibility == {"me/model": "public"}


def test_a_repository_that_is_public_already_is_not_pushed_to_by_accident(hub, tmp_path):
    hub.visibility["me/model"], hub.files["me/model"] = "public", {}
    with pytest.raises(UserError, match=r"me/model is public already\. Give --public"):
        pushed(tmp_path)
    assert hub.files == {"me/model": {}}
    assert hub.objects == {}
    run, merged = tmp_path / "run", tmp_path / "merged"
    push(merged, verified_files(merged, run, **ASKED), "me/model", public=True)
    assert len(hub.files["me/model"]) == 4


COMMIT = "/api/models/me/model/commit"


@pytest.mark.parametrize(
    "where",
    ["/api/repos/create", "/api/models/me/model/preupload", "/me/model.git", "/lfs/", COMMIT],
)
@pytest.mark.parametrize("public", [False, True])
def test_a_push_that_fails_half_way_shows_nothing_and_can_be_repeated(hub, tmp_path, where, public):
    """Large files wait in the hub's store; what makes them visible is one commit at the end."""
    hub.refuse[where] = 403
    with pytest.raises(UserError, match=r"me/model was not pushed .*repeats the push alone"):
        pushed(tmp_path, public=public)
    assert not hub.files.get("me/model")
    hub.refuse.clear()
    run, merged = tmp_path / "run", tmp_path / "merged"
    push(merged, verified_files(merged, run, **ASKED), "me/model", public=public)
    assert len(hub.files["me/model"]) == 4
    assert hub.visibility["me/model"] == ("public" if public else "private")


def test_a_hub_that_cannot_be_reached_is_told(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match=r"not pushed \(ConnectError: .*the network"):
        pushed(tmp_path)


@pytest.mark.parametrize("repo", ["model", "me/my/model", "me/", "/model", "me model/x", ""])
def test_a_repository_needs_a_namespace_and_a_name(hub, repo):
    with pytest.raises(UserError, match="wanted NAMESPACE/NAME"):
        check_can_push(repo)
    check_can_push("me/model-2.5")


def test_a_push_without_a_token_is_refused_before_any_request(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no token for the hub\. Log in with `hf auth login`"):
        check_can_push("me/model")
    assert hub.requests == []
    assert json.dumps(hub.files) == "{}"
