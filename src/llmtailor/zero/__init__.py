"""DeepSpeed's ZeRO engines, stages 1 to 3: the state on this rank by name, and memory to resume into."""

from .engines import World
from .filling import ZeroFilling, load_groups
from .live_layers import ZeroReader
from .reading import MASTER, ZeroState, read_zero
from .rest import load_rest, read_rest
from .training import ENGINE_STATE_NAME, EngineState, ZeroLoad, read_engine_state, write_engine_state

__all__ = [
    "ENGINE_STATE_NAME",
    "MASTER",
    "EngineState",
    "World",
    "ZeroFilling",
    "ZeroLoad",
    "ZeroReader",
    "ZeroState",
    "load_groups",
    "load_rest",
    "read_engine_state",
    "read_rest",
    "read_zero",
    "write_engine_state",
]
