"""Outputs that are kept beside those that Snakemake deletes."""

import os

import pytest

from kimi_recursive import published as module
from kimi_recursive.published import Published


def no_links(_source, _target):
    raise OSError("no hard links here")


@pytest.fixture(params=["links", "copies"])
def outputs(request, tmp_path, monkeypatch):
    """A file and a folder, on a file system with hard links and on one without."""
    if request.param == "copies":
        monkeypatch.setattr(module.os, "link", no_links)
    (tmp_path / "sidecar/adapter").mkdir(parents=True)
    (tmp_path / "sidecar/adapter/weights").write_bytes(b"trained")
    (tmp_path / "summary.json").write_text("{}")
    return tmp_path / "sidecar", tmp_path / "summary.json"


def test_what_was_deleted_comes_back_under_the_same_fingerprint_alone(outputs, tmp_path):
    folder, (sidecar, summary) = tmp_path / "published", outputs
    kept = Published(folder, outputs, {"lr": 1, "tokens": {"train": "x"}})
    assert not kept.fits(), "nothing is kept yet"
    kept.keep()
    (sidecar / "adapter/weights").unlink()
    (sidecar / "adapter").rmdir()
    (sidecar / ".snakemake_timestamp").touch()
    summary.unlink()
    assert not Published(folder, outputs, {"lr": 2, "tokens": {"train": "x"}}).fits()
    again = Published(folder, outputs, {"tokens": {"train": "x"}, "lr": 1})
    assert again.fits()
    again.restore()
    assert (sidecar / "adapter/weights").read_bytes() == b"trained" and summary.is_file()
    assert [path.name for path in sidecar.iterdir()] == ["adapter"]


def test_what_is_kept_takes_no_space_and_is_checked(outputs, tmp_path, request):
    kept = Published(tmp_path / "published", outputs, {})
    kept.keep()
    weights = tmp_path / "published/sidecar/adapter/weights"
    linked = os.path.samefile(weights, outputs[0] / "adapter/weights")
    assert linked == (request.node.callspec.params["outputs"] == "links")
    weights.write_bytes(b"damaged")
    assert not kept.fits()
    weights.unlink()
    assert not kept.fits()
    (tmp_path / "published/published.json").write_text("{")
    assert not kept.fits()
