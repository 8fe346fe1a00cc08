"""Op: one operator call with its shape, flops and bytes; FAMILIES says what the numbers of each family mean."""

from __future__ import annotations

from functools import lru_cache

from muxtune.spec.noun import noun
from muxtune.spec.peft import Direction as Direction
from muxtune.spec.peft import peft_kinds


@noun
class Family:
    """Names of the variables of a family: `size` ones are interpolated over, `shape` ones must match a measurement.

    A measurement gives the first `measured` size variables (all by default), the others follow from them.
    """

    size: tuple[str, ...]
    shape: tuple[str, ...]
    measured: int | None = None

    @property
    def grid(self) -> tuple[str, ...]:
        """The size variables that a measured point states."""
        return self.size[: self.measured]


#: Collectives over the ranks of a group; `bytes` are those of the whole tensor.
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
#: What tp ranks sum inside an adapter, apart from its BaseOp's collective.
ADAPTER_SUM = "adapter_sum"
#: What hangs on a BaseOp, a family a PEFT method; those of one BaseOp and method may run as one grouped operator.
ADAPTERS = frozenset({*peft_kinds(), ADAPTER_SUM})
#: Where the attention of queries with a past is measured; the operator itself is `attention` of length past + queries.
CHUNK_ATTENTION = "chunk_attention"
#: Measured remainders: what a block or a stage costs beyond its operators.
OVERHEADS = ("attention_overhead", "mlp_overhead", "stage_overhead")

FAMILIES: dict[str, Family] = {
    "embedding": Family(size=("tokens",), shape=("vocab", "hidden")),
    "rmsnorm": Family(size=("tokens",), shape=("hidden",)),
    "layernorm": Family(size=("tokens",), shape=("hidden",)),
    "linear": Family(size=("tokens",), shape=("in", "out", "bias")),
    **{kind: Family(size=("tokens",), shape=peft.SHAPE) for kind, peft in peft_kinds().items()},
    ADAPTER_SUM: Family(size=("bytes",), shape=("ranks", "backward")),
    "rope": Family(size=("tokens",), shape=("heads", "head_dim")),
    # Measured where it is square: as many queries as keys. A chunk's attention, whose keys are its past and its own, is
    # measured over its past (so that any past goes with any queries).
    CHUNK_ATTENTION: Family(size=("rows", "past", "queries"), shape=("heads", "kv_heads", "head_dim")),
    "attention": Family(size=("rows", "length", "queries"), shape=("heads", "kv_heads", "head_dim"), measured=2),
    "swiglu": Family(size=("tokens",), shape=("ffn_hidden",)),
    "geglu": Family(size=("tokens",), shape=("ffn_hidden",)),
    "gelu": Family(size=("tokens",), shape=("ffn_hidden",)),
    "relu": Family(size=("tokens",), shape=("ffn_hidden",)),
    "residual": Family(size=("tokens",), shape=("hidden",)),
    "cross_entropy": Family(size=("tokens",), shape=("vocab",)),
    "adamw": Family(size=("parameters",), shape=("tensors",)),
    "attention_overhead": Family(size=("tokens",), shape=("hidden", "ffn_hidden")),
    "mlp_overhead": Family(size=("tokens",), shape=("hidden", "ffn_hidden")),
    "stage_overhead": Family(size=("tokens",), shape=("first", "last")),
    "launch": Family(size=("count",), shape=()),
    "instruction": Family(size=("count",), shape=()),
    "all_reduce": Family(size=("bytes",), shape=("ranks",)),
    "reduce_scatter": Family(size=("bytes",), shape=("ranks",)),
    "all_gather": Family(size=("bytes",), shape=("ranks",)),
    "p2p": Family(size=("bytes",), shape=()),
    "collective_load": Family(size=("ctas",), shape=("link_bytes_per_s",)),
    "send": Family(size=("bytes",), shape=()),
    "recv": Family(size=("bytes",), shape=()),
}


@noun
class Op:
    """One call. `size` and `shape` follow FAMILIES[family]; `moved_bytes` counts each operand and result once."""

    family: str
    direction: Direction
    dtype: str
    size: tuple[int, ...]
    shape: tuple[int, ...]
    flops: int
    moved_bytes: int

    @property
    def group(self) -> tuple[str, str, str, tuple[int, ...]]:
        """What a measurement must match exactly; only `size` is interpolated."""
        return self.family, self.direction, self.dtype, self.shape


def linear(
    tokens: int, features: tuple[int, int], bias: bool, direction: Direction, dtype: str, element_bytes: int
) -> Op:
    """y = x Wᵀ (forward) or dx = dy W (backward; the weight is frozen): 2 · tokens · in · out flops either way."""
    k, n = features
    moved = (tokens * (k + n) + k * n) * element_bytes
    return Op(
        family="linear",
        direction=direction,
        dtype=dtype,
        size=(tokens,),
        shape=(k, n, int(bias)),
        flops=2 * tokens * k * n,
        moved_bytes=moved,
    )


@lru_cache(maxsize=1 << 14)
def adapter(kind: str, tokens: int, shape: tuple[int, ...], direction: Direction, dtype: str, element_bytes: int) -> Op:
    """A PEFT method's operator on one BaseOp; `shape` is named by the SHAPE of its noun, which counts the work."""
    peft = peft_kinds()[kind]
    products = sum(2 * rows * columns * depth for rows, columns, depth in peft.products(direction, tokens, shape))
    return Op(
        family=kind,
        direction=direction,
        dtype=dtype,
        size=(tokens,),
        shape=shape,
        flops=products + peft.pointwise_flops(direction, tokens, shape),
        moved_bytes=peft.elements(direction, tokens, shape) * element_bytes,
    )


def lora(tokens: int, features: tuple[int, int], rank: int, direction: Direction, dtype: str, element_bytes: int) -> Op:
    """y += scale · B (A x); backward adds dA, dB and (unless direction is `weights`) dx."""
    return adapter("lora", tokens, (*features, rank), direction, dtype, element_bytes)


def attention(
    rows: int,
    length: int,
    heads: tuple[int, int, int],
    direction: Direction,
    dtype: str,
    element_bytes: int,
    queries: int | None = None,
) -> Op:
    """Causal attention of the last `queries` tokens (all by default) of `rows` sequences to all `length` tokens up to theirs.

    2 · rows · queries · (2 · length − queries) · heads · head_dim flops (a token's attention to itself counts half, so that
    the chunks of a sequence add up to 2 · length²), backward 2.5×.
    """
    h, kv, d = heads
    q = length if queries is None else queries
    forward = 2 * rows * q * (2 * length - q) * h * d
    moved = rows * d * (2 * h * q + 2 * kv * length) * element_bytes
    factor = 1 if direction == "forward" else 2
    flops = forward if direction == "forward" else forward * 5 // 2
    return Op(
        family="attention",
        direction=direction,
        dtype=dtype,
        size=(rows, length, q),
        shape=heads,
        flops=flops,
        moved_bytes=moved * factor,
    )


def pointwise(
    family: str,
    tokens: int,
    shape: tuple[int, ...],
    reads_writes: int,
    flops_each: int,
    direction: Direction,
    dtype: str,
    element_bytes: int,
) -> Op:
    """A bandwidth-bound operator that touches `reads_writes` vectors of width shape[0] a token."""
    width = shape[-1] if family == "embedding" else shape[0] * (shape[1] if family == "rope" else 1)
    factor = 1 if direction == "forward" else 2
    return Op(
        family=family,
        direction=direction,
        dtype=dtype,
        size=(tokens,),
        shape=shape,
        flops=flops_each * tokens * width * factor,
        moved_bytes=reads_writes * tokens * width * element_bytes * factor,
    )


def adamw(parameters: int, tensors: int) -> Op:
    """Clip and AdamW over fp32 parameters: reads p, g, m, v; writes p, m, v."""
    return Op(
        family="adamw",
        direction="forward",
        dtype="fp32",
        size=(parameters,),
        shape=(tensors,),
        flops=14 * parameters,
        moved_bytes=28 * parameters,
    )


def message(family: str, size_bytes: int, shape: tuple[int, ...] = (), direction: Direction = "forward") -> Op:
    """A transfer of `size_bytes` (p2p, send, recv, all_reduce)."""
    return Op(
        family=family,
        direction=direction,
        dtype="bytes",
        size=(size_bytes,),
        shape=shape,
        flops=0,
        moved_bytes=size_bytes,
    )


def collective_load(ctas: int, link_bytes_per_s: int) -> Op:
    """What a collective takes from operators beside it while it runs: CTAs and memory traffic (see `CostModel.latency`)."""
    return Op(
        family="collective_load",
        direction="forward",
        dtype="bytes",
        size=(ctas,),
        shape=(link_bytes_per_s,),
        flops=0,
        moved_bytes=0,
    )


def host(family: str, direction: Direction = "forward", shape: tuple[int, ...] = ()) -> Op:
    """One occurrence of host work (launch, instruction)."""
    return Op(family=family, direction=direction, dtype="host", size=(1,), shape=shape, flops=0, moved_bytes=0)


def overhead(part: str, tokens: int, shape: tuple[int, int], direction: Direction, dtype: str) -> Op:
    """What an attention block, an MLP block or a whole stage costs beyond the sum of what is in it: measured, never derived."""
    return Op(
        family=f"{part}_overhead",
        direction=direction,
        dtype=dtype,
        size=(tokens,),
        shape=shape,
        flops=0,
        moved_bytes=0,
    )
