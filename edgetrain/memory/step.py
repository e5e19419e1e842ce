"""A training step under fake tensors, from any module to its trace.

The step is the steady one: weights, gradients' owners and the state of the optimiser are there when it begins,
gradients are not (``zero_grad`` sets them to None before each step, its default).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode

from edgetrain.chain.fakes import NeedsDataError, fake_like, fake_mode, spare_the_compiler
from edgetrain.errors import EdgetrainError, ModelError, UsageError, near_matches
from edgetrain.memory.eight_bit import EIGHT_BIT
from edgetrain.memory.operators import DeviceKind
from edgetrain.memory.trace import Recorder, StepTrace
from edgetrain.nn.slices import abridged_slices

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[Any], Tensor]

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "sgd-plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, foreach=False),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, foreach=False),
    **EIGHT_BIT,
}
"""Optimisers by name. Those that torch has in a fused form use it: it updates in place, without temporaries."""


def optimizer_factory(optimizer: str | OptimizerFactory) -> OptimizerFactory:
    """The function behind ``optimizer``; raises UsageError for an unknown name."""
    if callable(optimizer):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise UsageError(
            found=f"optimizer {optimizer!r}",
            expected="one of " + ", ".join(OPTIMIZERS),
            action=near_matches(optimizer, list(OPTIMIZERS)),
        )
    return OPTIMIZERS[optimizer]


def classification_loss(output: Any) -> Tensor:
    """Cross entropy of logits (n, classes, ...) against labels (n, ...); the mean of anything else that is a tensor.

    Of a tuple, a dictionary or a dataclass the tensors that require a gradient are taken together.
    """
    tensors = [t for t in _tensors(output) if t.requires_grad]
    if len(tensors) == 1 and tensors[0].dim() >= 2:
        logits = tensors[0]
        labels = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits, labels)
    if not tensors:
        raise ModelError(
            found=f"a model whose output {type(output).__name__} holds no tensor that requires a gradient",
            expected="something to train",
            action="unfreeze a parameter, or pass a loss",
        )
    return torch.stack([t.float().mean() for t in tensors]).sum()


def trace_step(
    model: nn.Module | Callable[[], nn.Module],
    *,
    input_shape: tuple[int, ...],
    batch_size: int,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    optimizer: str | OptimizerFactory | None = "sgd",
    loss: Loss = classification_loss,
    dtype: torch.dtype = torch.float32,
    device: DeviceKind = "cpu",
) -> StepTrace:
    """The operators and storages of one training step.

    Args:
        model: a module, which is left alone, or a function that makes one; the function is called under fake
            tensors, so that a model of any size takes no memory.
        input_shape: of one sample, (c, h, w).
        wrap: makes of the module the one that is trained, such as ``lambda m: edgetrain.wrap(m, plan)``.
        optimizer: a name of :data:`OPTIMIZERS`, a function of the parameters, or None for none.
        loss: from the model's output; called under fake tensors.
        dtype: of weights and batch.
        device: where the step is to run; it decides on the size of slices, and on how pooling works.

    Raises:
        ModelError: the step cannot run without data; names the module.
        UsageError: an unknown optimiser.
    """
    make_optimizer = None if optimizer is None else optimizer_factory(optimizer)
    mode = fake_mode()
    spare_the_compiler(torch.optim.Optimizer.add_param_group)
    recorder = Recorder()
    fake = fake_model(model, mode, dtype)
    net = fake if wrap is None else wrap(fake)
    with torch.random.fork_rng(devices=[]), mode, abridged_slices(device):
        x = torch.empty(batch_size, *input_shape, dtype=dtype)
        owned = list(fake.parameters())
        stepper = None if make_optimizer is None else make_optimizer([p for p in owned if p.requires_grad])
        with recorder.naming(fake):
            try:
                if stepper is not None:
                    create_state(stepper, recorder)
                classify_resident(recorder, fake, stepper, x)
                with recorder:
                    _step(recorder, net, stepper, x, loss, owned)
            except EdgetrainError:
                raise
            except Exception as error:
                raise explained(error, recorder, fake) from error
    return recorder.finish()


def _step(
    recorder: Recorder,
    net: nn.Module,
    stepper: torch.optim.Optimizer | None,
    x: Tensor,
    loss: Loss,
    parameters: list[nn.Parameter],
) -> None:
    with recorder.in_phase("forward"):
        value = loss(net(x))
    with recorder.in_phase("backward"):
        value.backward()
    for parameter in parameters:
        if parameter.grad is not None:
            recorder.classify(parameter.grad, "gradients")
    if stepper is not None:
        with recorder.in_phase("optimizer", scalars=True):
            update_parameters(stepper)


def create_state(stepper: torch.optim.Optimizer, recorder: Recorder) -> None:
    """The state that a first step leaves, outside the trace."""
    parameters = [p for group in stepper.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with _Scalars():
        update_parameters(stepper)
    for parameter in parameters:
        parameter.grad = None


class _Scalars(TorchDispatchMode):
    """Answers a request for the value of a tensor, such as a counter of steps, with 1."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


def classify_resident(recorder: Recorder, model: nn.Module, stepper: torch.optim.Optimizer | None, x: Tensor) -> None:
    """Weights, the state of the optimiser and the batch are there when the step begins."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        recorder.classify(tensor, "weights", name.rpartition(".")[0])
    for state in stepper.state.values() if stepper is not None else ():
        for tensor in _tensors(state):
            recorder.classify(tensor, "optimizer")
    recorder.classify(x, "batch")


def fake_model(model: nn.Module | Callable[[], nn.Module], mode: TorchDispatchMode, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` that shares its structure and has fake tensors in the place of its own."""
    if not isinstance(model, nn.Module):
        model = _without_memory(model)
    lazy = [name for name, tensor in model.named_parameters() if isinstance(tensor, UninitializedParameter)]
    if lazy:
        raise ModelError(
            found=f"a lazy module whose {lazy[0]} has no shape yet",
            expected="a model whose parameters have their shapes",
            action="run it once on a batch of zeros, or write the numbers of inputs out",
        )
    memo: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
            for tensor in held:
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    memo[id(tensor)] = _fake(tensor, dtype)
    return copy.deepcopy(model, memo).train()


def _without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """``make()`` with tensors that have no data, where it does not look at their values."""
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):
        return make()


def _fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    faked = fake_like(tensor, dtype if tensor.is_floating_point() else None)
    return nn.Parameter(faked, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else faked


def explained(error: Exception, recorder: Recorder, model: nn.Module) -> ModelError:
    """What to tell of a failure under fake tensors."""
    name = recorder.current_module
    module = dict(model.named_modules()).get(name, model)
    where = f"{name or 'the model'} ({type(module).__name__})"
    if isinstance(error, NeedsDataError):
        return ModelError(
            found=f"{where} decides by the values of its data ({error})",
            expected="a step whose operators depend on shapes alone",
            action="measure instead: pass --measure, or measured=True, which runs small batches for real",
        )
    return ModelError(
        found=f"{where} fails on tensors without data: {str(error).splitlines()[0] if str(error) else error!r}",
        expected="a model that takes a batch of the given shape",
        action="check --input; where the module needs data, pass --measure, which runs small batches for real",
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for item in dataclasses.fields(value) for t in _tensors(getattr(value, item.name))]
    return []


def update_parameters(stepper: torch.optim.Optimizer) -> None:
    """``stepper.step()`` without its wrappers, which import torch's compiler and call hooks."""
    with torch.no_grad():
        inspect.unwrap(type(stepper).step)(stepper)
