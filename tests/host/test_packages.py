"""What an error says about a missing package can be typed as it stands."""

from __future__ import annotations

from errors import refuses
from tunesmith.errors import MachineError
from tunesmith.host import packages


def test_a_package_of_a_wrong_version_is_refused_with_the_command(tmp_path, monkeypatch):
    packages.check_versions()
    place = tmp_path / "transformers-4.57.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    packages.installed_versions.cache_clear()
    allowed = "transformers<6,>=5.17"
    try:
        with refuses(
            MachineError, names=["transformers 4.57.0", allowed], cause="version"
        ) as caught:
            packages.check_versions()
    finally:
        packages.installed_versions.cache_clear()
    assert caught.value.fix == f"pip install '{allowed}'"
