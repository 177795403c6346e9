"""torchtitan on a CPU: `python -m tests.titan.cpu` is `python -m torchtitan.train` where there is no GPU.

torchtitan 0.3 takes for granted that there is one: it asks it for its name and memory, and names it at a barrier.
"""

from __future__ import annotations

import types

import torch
import torch.distributed as dist

torch._utils._get_available_device_type = lambda: "cpu"
_barrier = dist.barrier
dist.barrier = lambda *args, device_ids=None, **kwargs: _barrier(*args, **kwargs)
torch.cpu.get_device_name = lambda device=None: "cpu"
torch.cpu.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=2**34)
torch.cpu.memory_stats = lambda device=None: {}
torch.cpu.reset_peak_memory_stats = lambda device=None: None
torch.cpu.empty_cache = lambda: None

if __name__ == "__main__":
    from torchtitan.train import main

    main()
