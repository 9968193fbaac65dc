"""How much memory a process uses, and when freed memory is given back to the system."""

from types import SimpleNamespace

import psutil
import torch

from pocl_fast.system import memory
from pocl_fast.system.memory import FreedMemory, memory_in_use


def test_a_cpus_memory_is_that_of_the_process():
    assert abs(memory_in_use(torch.device("cpu")) - psutil.Process().memory_info().rss) < 1 << 24


def test_freed_memory_is_returned_when_the_process_has_grown_and_not_again_before_it_grows_again(monkeypatch):
    monkeypatch.setattr(memory, "GROWTH", 100)
    used, returned = [1000], []  # bytes

    class Process:
        def memory_info(self):
            return SimpleNamespace(rss=used[0])

    def trim(pad):
        returned.append(used[0])
        used[0] -= 5

    freed = FreedMemory()
    freed._process, freed._floor, freed._trim = Process(), used[0], trim
    for used[0] in (1000, 1100, 1101, 1196, 1197):  # 1096 are left after the first return
        freed.return_if_grown()
    assert returned == [1101, 1197]


def test_a_c_library_that_keeps_nothing_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(memory, "GROWTH", -1 << 60)
    FreedMemory().return_if_grown()
