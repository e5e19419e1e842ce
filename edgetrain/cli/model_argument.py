"""``--model NAME`` of the zoo, or ``--model module:function`` of the user's own code."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from edgetrain.chain import SampledNetwork, freeze
from edgetrain.errors import EdgetrainError, ModelError, UsageError
from edgetrain.models import create_model, pooling_letters, pooling_sequences
from edgetrain.targets.memory import says_out_of_memory


def sampled_maker(
    make_model: Callable[[], nn.Module], keep: str | None, *, input_shape: tuple[int, int, int], seed: int
) -> Callable[[], nn.Module]:
    """A function that makes the network of ``make_model`` with sampled modules; ``keep`` None samples none."""
    if keep is None:
        return make_model
    return functools.partial(_sampled, make_model, keep, input_shape, seed)


def _sampled(
    make_model: Callable[[], nn.Module], keep: str, input_shape: tuple[int, int, int], seed: int
) -> SampledNetwork:
    return SampledNetwork(make_model(), keep, input_shape=input_shape, seed=seed)


def model_maker(
    spec: str, *, num_classes: int | None, in_channels: int, pooling: str | None = None, frozen: int = 0
) -> Callable[[], nn.Module]:
    """A function that makes the network ``spec`` names, with fresh weights.

    A function of the user's is called with ``num_classes`` and ``in_channels`` if it takes them.

    Args:
        num_classes: None leaves the number to the model.
        pooling: sequence of a network of the zoo, a letter for each: ``ccb``; None leaves it to the model.
        frozen: leading blocks that are not trained, :func:`edgetrain.freeze`.

    Raises:
        UsageError: nothing has that name, what it gives is no module, or its pooling cannot be chosen.
    """
    offered: dict[str, Any] = {"in_channels": in_channels} | (
        {} if num_classes is None else {"num_classes": num_classes}
    )
    if pooling is not None:
        offered["pooling"] = parse_pooling(spec, pooling)
    make: Callable[[], nn.Module]
    if ":" in spec:
        _load(spec)
        make = functools.partial(_call, spec, offered)
    else:
        make = functools.partial(create_model, spec, **offered)
    return functools.partial(_frozen, make, frozen) if frozen else make


def _frozen(make: Callable[[], nn.Module], blocks: int) -> nn.Module:
    return freeze(make(), blocks)


def parse_pooling(name: str, letters: str) -> tuple[str, ...]:
    """The pooling sequence of the network ``name`` that ``letters`` such as ``ccb`` stand for.

    Raises:
        UsageError: the network has no such sequence.
    """
    sequences = {pooling_letters(sequence): sequence for sequence in pooling_sequences(name)}
    if letters not in sequences:
        raise UsageError(
            found=f"--pooling {letters} for {name}",
            expected="one of " + ", ".join(sequences),
            action="give a letter for each pooling of the network, c for channel and b for batch",
        )
    return sequences[letters]


def _load(spec: str) -> Callable[..., Any]:
    module_name, _, function_name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
        return function
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UsageError(
            found=f"--model {spec}: {type(error).__name__}: {error}",
            expected="a function in a module that can be imported from this folder",
            action="write it like my_models:make_net",
        ) from error
    finally:
        sys.path.pop(0)


def _call(spec: str, offered: dict[str, Any]) -> nn.Module:
    """The network; finds the function by its name, so that it can be called in another process."""
    import inspect

    function = _load(spec)

    try:
        taken = inspect.signature(function).parameters
        model = function(**{name: value for name, value in offered.items() if name in taken})
    except EdgetrainError:
        raise
    except Exception as error:
        if says_out_of_memory(error):
            raise
        raise ModelError(
            found=f"{spec} failed: {type(error).__name__}: {error}",
            expected="a function that makes the network from num_classes and in_channels, if it takes them",
            action="correct the function, or give its other arguments defaults",
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            found=f"{spec} gave {type(model).__name__}",
            expected="a torch.nn.Module",
            action="return the network from the function",
        )
    return model
