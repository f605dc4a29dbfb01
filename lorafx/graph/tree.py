"""Tensors by dotted name in a bare tree of modules: the storage under a program's graph."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn


def _owner(root: nn.Module, name: str, create: bool = False) -> tuple[nn.Module, str]:
    *path, leaf = name.split(".")
    module = root
    for part in path:
        child = module._modules.get(part)
        if child is None:
            if not create:
                raise KeyError(name)
            child = nn.Module()
            module.add_module(part, child)
        module = child
    return module, leaf


def get_tensor(root: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called ``name``; KeyError when there is none."""
    module, leaf = _owner(root, name)
    value = module._parameters.get(leaf)
    if value is None:
        value = module._buffers.get(leaf)
    if value is None:
        raise KeyError(name)
    return value


def hooks_gradient(value: Tensor) -> bool:
    """Whether a hook is called with the gradient of ``value``: it may change it, or take an optimiser step of its
    own."""
    return bool(value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None))


def put_tensor(root: nn.Module, name: str, value: Tensor, persistent: bool = True) -> None:
    """Register ``value`` under ``name``: a Parameter as a parameter, any other tensor as a buffer."""
    module, leaf = _owner(root, name, create=True)
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value, persistent=persistent)


def drop_tensor(root: nn.Module, name: str) -> None:
    """Forget the tensor called ``name`` and the modules it leaves empty."""
    module, leaf = _owner(root, name)
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)
    parts = name.split(".")[:-1]
    while parts:
        parent, last = _owner(root, ".".join(parts))
        child = parent._modules[last]
        assert child is not None
        if child._parameters or child._buffers or child._modules:
            return
        del parent._modules[last]
        parts.pop()


def has_tensor(root: nn.Module, name: str) -> bool:
    """Whether a parameter or buffer of that name exists."""
    try:
        get_tensor(root, name)
    except KeyError:
        return False
    return True


def below(root: nn.Module, owner: str, short: str) -> str:
    """The name of a tensor that belongs to the module ``owner``; or to the tensor, below which there can be none."""
    return f"{owner}_{short}" if has_tensor(root, owner) else f"{owner}.{short}"


def named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, then every buffer, aliases of tied tensors included."""
    modules = list(_modules(root, ""))
    for kind in ("_parameters", "_buffers"):
        for prefix, module in modules:
            yield from ((prefix + leaf, value) for leaf, value in getattr(module, kind).items() if value is not None)


def aliases(root: nn.Module, name: str) -> list[str]:
    """All names of the tensor called ``name``, itself included (more than one when it is tied)."""
    value = get_tensor(root, name)
    return [other for other, tensor in named_tensors(root) if tensor is value]


def ties(root: nn.Module) -> dict[str, list[str]]:
    """For every tensor's name, all names of that tensor, itself included."""
    names: dict[int, list[str]] = {}
    for name, value in named_tensors(root):
        names.setdefault(id(value), []).append(name)
    return {name: alike for alike in names.values() for name in alike}


def _modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    # torch's own walk looks for duplicates at every step, which takes most of the time of a fold.
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.")


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; on the meta device, whether they are one tensor."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return a.data_ptr() == b.data_ptr() or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def tensor_hash(value: Tensor) -> str:
    """sha256 of a tensor's bytes, in row-major order."""
    plain = value.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest()


def persistent(root: nn.Module, name: str) -> bool:
    """Whether the tensor belongs to the state dict (every parameter does)."""
    module, leaf = _owner(root, name)
    return leaf not in module._non_persistent_buffers_set


def copy_tree(root: nn.Module, apart: Collection[str] = ()) -> nn.Module:
    """A new tree of new Parameter objects over the same storage; ties stay ties, inner graph modules are shared.

    Tensors named in ``apart`` get storage of their own.

    New objects let two programs differ in ``requires_grad`` without a copy of the weights.
    """
    result = nn.Module()
    seen: dict[int, Tensor] = {}
    made = {"": result}
    modules = list(_modules(root, ""))
    for kind in ("_parameters", "_buffers"):
        for prefix, module in modules:
            held = {leaf: value for leaf, value in getattr(module, kind).items() if value is not None}
            owner = _grown(made, prefix) if held else module
            for leaf, value in held.items():
                if id(value) not in seen:
                    seen[id(value)] = _twin(value, prefix + leaf in apart)
                # As in register_parameter and register_buffer, of names that a tree has taken already.
                twin = seen[id(value)]
                if isinstance(twin, nn.Parameter):
                    owner._parameters[leaf] = twin
                else:
                    owner._buffers[leaf] = twin
                if leaf in module._non_persistent_buffers_set:
                    owner._non_persistent_buffers_set.add(leaf)
    for name, module in root.named_children():
        if isinstance(module, torch.fx.GraphModule):
            result.add_module(name, module)
    return result


def _grown(made: dict[str, nn.Module], prefix: str) -> nn.Module:
    """The module of a tree that is being made whose tensors' names begin with ``prefix``; ``made`` are those it has."""
    if prefix not in made:
        before, _, name = prefix[:-1].rpartition(".")
        made[prefix] = nn.Module()
        _grown(made, before and before + ".")._modules[name] = made[prefix]
    return made[prefix]


def _twin(value: Tensor, apart: bool) -> Tensor:
    """A parameter of the same storage, a buffer itself; a copy of either if it is to be ``apart``."""
    held = value.detach().clone() if apart else value
    return nn.Parameter(held.detach(), value.requires_grad) if isinstance(value, nn.Parameter) else held


def own_when_trained(value: nn.Parameter) -> None:
    """Give a trainable parameter storage of its own when its first gradient arrives: what shares it now, another
    program or the user's model, stays as it is, and a model that is never trained is not copied."""
    if getattr(value, "_lorafx_watched", False):
        return

    def take(value: Tensor) -> None:
        value.data = value.data.clone()
        handle.remove()

    handle = value.register_post_accumulate_grad_hook(take)
    vars(value).update(_lorafx_watched=True)
