"""What class a module is for a lookup, whatever torch made of it, and what is wrapped around it."""

from __future__ import annotations

from torch import nn

# wrappers of one module that hand calls and attributes on, by module path and class name -> attribute that holds it
_AROUND_BLOCKS = {
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper"): "_checkpoint_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "OffloadWrapper"): "_checkpoint_wrapped_module",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
}
FIRST = "patch the model first and {} it afterwards"


def path_of(cls: type) -> str:
    """The full name of a class; names of models occur in several packages."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_of(module: nn.Module) -> type:
    """The class that lookups go by: behind a class that torch derived from it at run time.

    `fully_shard` (FSDP2) and parametrisations give an object a class of its own, derived from the one it had.
    """
    cls = type(module)
    while cls.__module__.startswith("torch."):
        own = [base for base in cls.__bases__ if not base.__module__.startswith("torch.")]
        if len(own) != 1:
            break
        cls = own[0]
    return cls


def unwrapped(block: nn.Module) -> nn.Module:
    """A block without what was wrapped around it: activation checkpointing, a compiler, shards."""
    while (attribute := _AROUND_BLOCKS.get((type(block).__module__, type(block).__name__))) is not None:
        block = getattr(block, attribute)
    return block


def refuse_derived(module: nn.Module, where: str) -> None:
    """Refuses to change the class of a module that torch has given a class of its own.

    Raises:
        TypeError: with the way to do it.
    """
    if class_of(module) is type(module):
        return
    sharded = any(base.__module__.startswith("torch.distributed.") for base in type(module).__mro__)
    done, verb = ("sharded (fully_shard)", "shard") if sharded else ("given a class of its own", "parametrise")
    raise TypeError(
        f"{where} was {done} by torch as {path_of(type(module))}, and its class cannot be changed any more; "
        f"{FIRST.format(verb)} (and unpatch it before that)"
    )


def refuse_wrapped(block: nn.Module, where: str) -> None:
    """Refuses blocks with something around them.

    Raises:
        TypeError: with the way to do it.
    """
    if unwrapped(block) is not block:
        raise TypeError(f"{where} is wrapped in {path_of(type(block))}; {FIRST.format('wrap')}")
