"""Random weights: fixed by seed and name, shaped as Transformers starts a model, through the hooks
of nf4 too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes import built_model, make_run
from tunesmith.config.schema import Run
from tunesmith.formats.linear import has_codes
from tunesmith.model.random_init import init_weight


def weights(run: Run, folder: Path) -> dict[str, torch.Tensor]:
    model = built_model(run, folder, weights="random").model
    return {n: p.detach() for n, p in (*model.named_parameters(), *model.named_buffers())}


@pytest.fixture
def bare(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model's folder without its weights."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.slow
def test_weights_are_fixed_by_seed_and_name(bare: Path, tmp_path: Path) -> None:
    run = make_run(bare, tmp_path, train={"seed": 1})
    first, again = weights(run, bare), weights(run, bare)
    full = weights(make_run(bare, tmp_path, train={"seed": 1}, adapter={"kind": "none"}), bare)
    other = weights(make_run(bare, tmp_path, train={"seed": 2}), bare)
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in full if full[name].ndim == 2]
    assert len(matrices) == 15  # a tied embedding, and 7 in each of 2 layers
    for name in matrices:
        assert torch.equal(first[name], full[name]), "an adapter changes no base weight"
        assert not torch.equal(first[name], other[name])
    every = torch.cat([full[name].flatten() for name in matrices])
    # 4 of its own errors
    assert every.std().item() == pytest.approx(0.02, rel=4 / (2 * len(every)) ** 0.5)
    assert abs(every.mean().item()) < 4 * 0.02 / len(every) ** 0.5
    flat = [full[name].flatten()[:2048] for name in matrices]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])
    norms = [value for name, value in full.items() if "norm" in name]
    assert len(norms) == 5
    assert all((value == 1).all() for value in norms)


@pytest.mark.slow
def test_nf4_layers_are_quantised_from_the_same_draw(bare: Path, tmp_path: Path) -> None:
    """Reference: bitsandbytes on the dense weight that a run without nf4 draws under the same name."""
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = weights(make_run(bare, tmp_path, model={"dtype": "bf16"}), bare)
    run = make_run(bare, tmp_path, model={"dtype": "bf16", "quantize": "nf4"})
    model = built_model(run, bare, weights="random").model
    layers = {n: m for n, m in model.named_modules() if has_codes(m)}
    assert len(layers) == 14
    for name, layer in layers.items():
        packed, _ = functional.quantize_4bit(
            dense[f"{name}.weight"], blocksize=64, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(layer.weight, packed.reshape(-1, 1)), name


def test_biases_are_zero() -> None:
    bias = torch.ones(8)
    init_weight(bias, "q.bias", 0)
    assert (bias == 0).all()
