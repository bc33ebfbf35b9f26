"""What the parameters of a vision transformer's block do, whatever an implementation calls them."""

from dataclasses import dataclass

from torch import nn

from models import BackboneTail

ROLES = {  # role in a pre-norm block -> what implementations call the module
    "norm1": ("layernorm_before", "norm1", "layer_norm1"),
    "query": ("attention.q_proj", "self_attn.q_proj", "attention.attention.query"),
    "key": ("attention.k_proj", "self_attn.k_proj", "attention.attention.key"),
    "value": ("attention.v_proj", "self_attn.v_proj", "attention.attention.value"),
    "output": ("attention.o_proj", "self_attn.out_proj", "attention.output.dense"),
    "scale1": ("layer_scale1",),
    "norm2": ("layernorm_after", "norm2", "layer_norm2"),
    "gate": ("mlp.gate_proj",),  # of a SwiGLU
    "in": ("mlp.fc1", "mlp.up_proj", "intermediate.dense"),
    "out": ("mlp.fc2", "mlp.down_proj", "output.dense"),
    "scale2": ("layer_scale2",),
}
OPTIONAL = ("scale1", "gate", "scale2")
MLP = ("norm2", "gate", "in", "out", "scale2")  # the other roles are attention's
ACTIVATIONS = ("mlp.activation_fn", "mlp.act_fn", "intermediate.intermediate_act_fn")


@dataclass(frozen=True)
class BlockMatrix:
    """A tracked weight matrix of a `BackboneTail`.

    Attributes:
        block: among the trained ones, from 0.
        role: what it does in the block, a key of `ROLES`; where that is not known, the module's own name.
        heads: number of attention heads, which share out the rows of query, key and value, and the columns of output;
            None where it is not known.
    """

    block: int
    role: str
    heads: int | None


def block_matrices(tail: BackboneTail) -> list[BlockMatrix]:
    """What the tracked matrices of a tail are, in its order of them."""
    known = {}
    for number, block in enumerate(tail.blocks):
        modules, heads = roles_of(block), heads_of(block)
        known |= {f"blocks.{number}.{name}.weight": BlockMatrix(number, r, heads) for r, name in modules.items()}
    parts = {name: name.split(".", 2) for name in tail.tracked_names}  # blocks, number, the module's own name
    return [
        known.get(name) or BlockMatrix(int(number), module.removesuffix(".weight"), None)
        for name, (_, number, module) in parts.items()
    ]


@dataclass(frozen=True)
class Half:
    """Attention or MLP of a block, with the norm before it: what it gives is added to what it was given.

    Attributes:
        names: of its parameters in a `BackboneTail`.
        matrices: those of `names` that are tracked.
        output: those of the linear layer that it ends with: where they are 0 it adds nothing; none where it is not
            known.
    """

    names: tuple[str, ...]
    matrices: tuple[str, ...]
    output: tuple[str, ...]


def tail_halves(tail: BackboneTail) -> list[Half]:
    """Two of each block, first to last; a block that does not say what all its parameters are for is one."""
    found = []
    for number, block in enumerate(tail.blocks):
        parts = _halves(block) or [([name for name, _ in block.named_parameters()], None)]
        for own, output in parts:
            names = tuple(f"blocks.{number}.{name}" for name in own)
            ends = () if output is None else tuple(n for n in names if n.startswith(f"blocks.{number}.{output}."))
            found.append(Half(names, tuple(name for name in names if name in tail.tracked_names), ends))
    return found


def _halves(block: nn.Module) -> list[tuple[list[str], str]] | None:
    """Names of the parameters of attention and of MLP, each with the linear layer that it ends with."""
    roles, parts = roles_of(block), {True: [], False: []}
    if not roles.keys() >= ROLES.keys() - {*OPTIONAL}:
        return None
    inside = {mlp: {roles[role].split(".")[0] for role in roles if (role in MLP) == mlp} for mlp in (True, False)}
    if inside[True] & inside[False]:
        return None
    for name, _ in block.named_parameters():
        of = [mlp for mlp in (True, False) if name.split(".")[0] in inside[mlp]]
        if not of:
            return None
        parts[of[0]].append(name)
    return [(parts[False], roles["output"]), (parts[True], roles["out"])]


def roles_of(block: nn.Module) -> dict[str, str]:
    """Role -> name of the module that has it in this block."""
    modules = {name for name, _ in block.named_modules()}
    found = {role: next((name for name in names if name in modules), None) for role, names in ROLES.items()}
    return {role: name for role, name in found.items() if name is not None}


def heads_of(block: nn.Module) -> int | None:
    """Number of attention heads, as the module that holds the query says."""
    query = roles_of(block).get("query")
    if query is None:
        return None
    attention = block.get_submodule(query.rpartition(".")[0])
    return getattr(attention, "num_attention_heads", None) or getattr(attention, "num_heads", None)
