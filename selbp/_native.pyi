"""The CPU core: addresses and shapes in, nothing validated; called through selbp.ops only."""

SOURCES: str  # digest of what it was built from

def level() -> str: ...
def choose_rows(
    n: int,
    k: int,
    score: int,
    valid: int,
    draws: int,
    rule: int,
    weights: int,
    indices: int,
    found: int,
    scratch: int,
) -> None: ...
def percentile(n: int, length: int, loss: int, history: int, next: int, share: int, scratch: int) -> None: ...
def cube(
    n: int, dimensions: int, x: int, probability: int, order: int, draws: int, scratch: int, group: int
) -> int: ...
def draw(
    pool: int,
    k: int,
    uniform: int,
    ids: int,
    table: tuple[int, int, int, int, int],
    factor: int,
    power: float,
    floor: float,
    seed: int,
    step: int,
    rows: int,
    odds: int,
    draws: int,
    scratch: int,
) -> None: ...
def record(
    rows: int,
    classes: int,
    stride: int,
    logits: int,
    target: int,
    ids: int,
    place: int,
    live: int,
    uniform: int,
    time: int,
    table: tuple[int, int, int, int, int],
    state: int,
    transition: int,
    counts: int,
    window: float,
    scratch: int,
) -> int: ...
def gram(
    out: int,
    packed: int,
    r: int,
    h: int,
    is_double: bool,
    n: int,
    classes: int,
    features: int,
    bias: bool,
    n_threads: int,
) -> bool: ...
def row_dots(sums: int, a: int, b: int, is_double: bool, rows: int, columns: int, n_threads: int) -> None: ...
def gram_pairs(
    out: int, packed: int, r: int, h: int, n: int, class_pairs: int, feature_pairs: int, bias: bool, n_threads: int
) -> bool: ...
def multiplies_bfloat16() -> bool: ...
def mean_gradient(
    r: int,
    h: int,
    is_double: bool,
    shape: tuple[int, int, int],
    bias: bool,
    out: tuple[int, int, int, int],
    n_threads: int,
) -> bool: ...
def matching_residual(
    r: int, h: int, shape: tuple[int, int, int], bias: bool, indices: int, weights: int, k: int
) -> tuple[float, float]: ...
def match_gradients(
    r: int,
    h: int,
    is_double: bool,
    shape: tuple[int, int, int],
    bias: bool,
    k: int,
    rule: int,
    nonnegative: bool,
    ridge: float,
    valid: int,
    indices: int,
    weights: int,
) -> bool: ...
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
    n_threads: int,
    near_bytes: int = -1,
    fill: bool = False,
) -> None: ...

STATISTICS_STATE: int  # float64 values that carry one row from tile to tile

def statistics(
    logits: int,
    type: int,
    row_stride: int,
    rows: int,
    columns: int,
    first_class: int,
    n_classes: int,
    features: int,
    feature_type: int,
    feature_stride: int,
    n_features: int,
    feature_bias: bool,
    target: int,
    class_weight: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    state: int,
    loss: int,
    lse: int,
    residual_sq: int,
    feature_sq: int,
    others: int,
    correct: int,
    valid: int,
    n_threads: int,
) -> int: ...
def head_statistics(
    features: int,
    feature_stride: int,
    rows: int,
    n_features: int,
    weight: int,
    weight_stride: int,
    n_classes: int,
    bias: int,
    target: int,
    class_weight: int,
    ignore_index: int,
    loss: int,
    lse: int,
    residual_sq: int,
    feature_sq: int,
    others: int,
    correct: int,
    valid: int,
) -> int: ...
def score_minibatch(
    logits: int,
    type: int,
    row_stride: int,
    rows: int,
    classes: int,
    features: int,
    feature_type: int,
    feature_stride: int,
    n_features: int,
    feature_bias: bool,
    target: int,
    class_weight: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    weight_sum: float,
    out: tuple[int, ...],
    n_threads: int,
) -> int: ...
def residual(
    out: int,
    logits: int,
    type: int,
    row_stride: int,
    rows: int,
    columns: int,
    first_class: int,
    n_classes: int,
    weight_sum: float,
    lse: int,
    others: int,
    scale: int,
    target: int,
    class_weight: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    n_threads: int,
) -> int: ...
