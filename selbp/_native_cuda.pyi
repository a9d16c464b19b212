"""The CUDA core: device addresses and shapes in, nothing validated; called through selbp.ops only."""

def architectures() -> str: ...
def probe(device: int) -> int: ...
def error_text(code: int) -> str: ...
def match_workspace(batch: int, is_double: bool, n: int, k: int, device: int) -> int: ...
def match(
    buffers: tuple[int, int, int, int, int, int, int, int, int],
    is_double: bool,
    batch: int,
    n: int,
    k: int,
    rule: int,
    nonnegative: bool,
    ridge: float,
    tolerance: float,
    fill: bool,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def launch_choice(
    kernel: int, problem: int, size: int, threads: int, shared: int, device: int, stream: int
) -> None: ...
