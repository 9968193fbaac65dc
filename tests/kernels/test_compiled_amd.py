"""What the compiler makes of the dense kernel for AMD's GPUs, read from the assembly: no GPU is needed, nor used."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from compiling import finish, start

from pocl_fast.kernels import tiles
from pocl_fast.loss.objective import DIVERGENCES


@pytest.mark.full
# one of CDNA and one of RDNA, which has half as many threads a warp
@pytest.mark.parametrize(("arch", "warp"), [("gfx942", 64), ("gfx1100", 32)])
def test_every_family_compiles_without_spilling_and_moves_its_logits_in_128_bits(tmp_path, arch, warp):
    kernels = finish(start("compile_amd_report.py", tmp_path, arch, str(warp)))
    assert {kernel["family"] for kernel in kernels} == set(DIVERGENCES)
    for kernel in kernels:
        assert kernel["warps"] * warp == 512, kernel
        assert kernel["vgpr_spill_count"] == kernel["private_segment_fixed_size"] == 0, kernel
        # two rows, ahead of each loop and in it: normalisers, with infinities too, and gradient. An ignored row's zeros
        assert kernel["load"] >= 12, kernel
        assert kernel["store"] >= 2, kernel


@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("V", [1, 300, 32000, 151936])
def test_a_tiles_lanes_are_the_threads_of_its_warps_on_an_amd_gpu(monkeypatch, warp, V):
    monkeypatch.setattr(torch.version, "hip", "of no version")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(warp_size=warp))
    tile = tiles.choose_tile("jsd", V, 2, 2, 0)
    assert tile.lanes == tile.num_warps * warp
