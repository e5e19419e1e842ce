"""A parametrised tensor becomes the plain one that its parametrisation computes.

    Dirac:           W_hat = diag(a) I + diag(b) W / |W|      (Zagoruyko and Komodakis 2017; (5.5) of the thesis)
    weight norm:     W = g v / |v|                            (Salimans and Kingma 2016)
    spectral norm:   W / sigma, sigma from the u and v of the last training step     (Miyato et al. 2018)

and any other that is registered with ``torch.nn.utils.parametrize``, and torch's older weight and spectral norm, which
are hooks. Computed in float64 in evaluation mode.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edgetrain.export.folds.report import Fold


@torch.no_grad()
def fold_parametrisations(root: nn.Module, origins: dict[str, tuple[str, ...]]) -> list[Fold]:
    """Makes every parametrised tensor inside ``root``, which is in evaluation mode, a plain one.

    Args:
        origins: by name of a parameter or buffer, brought up to date.
    """
    done = []
    for path, module in list(root.named_modules()):
        if parametrize.is_parametrized(module):
            rules = {
                name: ", ".join(type(rule).__name__.lstrip("_") for rule in chain)
                for name, chain in module.parametrizations.items()
            }
            exact = copy.deepcopy(module).double()
            values = {name: getattr(exact, name) for name in rules}
            for name in rules:
                remove = functools.partial(_remove, module, name)
                done.append(_fold(path, module, name, values[name], rules[name], remove, origins))
        for hook in list(module._forward_pre_hooks.values()):
            exact = copy.deepcopy(module).double()
            if isinstance(hook, WeightNorm):
                value = hook.compute_weight(exact)
                remove = functools.partial(remove_weight_norm, module, hook.name)
                done.append(_fold(path, module, hook.name, value, "WeightNorm", remove, origins))
            elif isinstance(hook, SpectralNorm):
                value = hook.compute_weight(exact, do_power_iteration=False)
                remove = functools.partial(remove_spectral_norm, module, hook.name)
                done.append(_fold(path, module, hook.name, value, "SpectralNorm", remove, origins))
    return done


def _remove(module: nn.Module, name: str) -> None:
    """Takes the parametrisation of ``name`` from a copy.

    torch's own ``remove_parametrizations`` deletes the property from the class, which the copy shares with the model
    it was copied from; here the copy gets its former class back.
    """
    value = getattr(module, name)
    parametrizations = module.parametrizations
    del parametrizations[name]  # type: ignore[union-attr, operator]
    if not parametrizations:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _fold(
    path: str,
    module: nn.Module,
    name: str,
    value: Tensor,
    what: str,
    remove: Callable[[], object],
    origins: dict[str, tuple[str, ...]],
) -> Fold:
    """Removes one parametrisation and puts ``value`` in the tensor's place."""
    before = _tensors(module)
    remove()
    after = _tensors(module)
    dtype = after[name].dtype
    if name in module._buffers:
        module._buffers[name] = value.detach().to(dtype)
    else:
        module._parameters[name] = nn.Parameter(value.detach().to(dtype), requires_grad=False)
    full = f"{path}.{name}".lstrip(".")
    sources = [f"{path}.{key}".lstrip(".") for key in before if key not in after or key == name]
    origins[full] = tuple(dict.fromkeys(o for source in sources for o in origins.pop(source, (source,))))
    return Fold("parametrisation", full, f"{what} computed once")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
