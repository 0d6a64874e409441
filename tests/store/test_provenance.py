"""What files say of their origin, and what they must not say."""

from pathlib import Path

from theloom.store import provenance


def test_versions_and_code_are_recorded():
    found = provenance.attributes("tokens", corpus="text")
    assert found["format"] == "theloom.tokens"
    assert {"torch", "transformers", "h5py", "theloom"} <= set(found["package_versions"])
    assert found["code_version"]
    assert found["corpus"] == "text"


def test_the_home_folder_is_written_as_a_tilde(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    hidden = provenance.without_home(
        {"a": ["/home/ada/x", "x=/home/ada/y z", "/home/adam", "/home/ada"], "b": 3}
    )
    assert hidden == {"a": ["~/x", "x=~/y z", "/home/adam", "~"], "b": 3}
